"""Parameters and multiply-accumulates of any backbone, counted on the meta device.

All counts are at batch 1. What the paper calls Gflops are multiply-accumulates. Conventions:

    core          every convolution, linear layer, matrix product and recurrence; also attention's
                  two products, whichever kernel runs
    torchprofile  the paper's: core, one per output element of every multiplication, affine norm
                  and pooling, and four per output element of a bilinear resize
    norms         core, and one per output element of every norm: DiT's own table and its ADM rows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from backbones import kernels
from experiments.engine.records.code import require_own_code
from experiments.engine.specs.spec import Cost

aten = torch.ops.aten

# Counts an operator from its arguments and its output.
Rule = Callable[[tuple[Any, ...], Any], int]


def _count_convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """Count a convolution; transposed ones do not occur in these networks."""
    weight = args[1]  # (out, in / groups, k, k)
    return out.numel() * math.prod(weight.shape[1:])


def _count_dot(args: tuple[Any, ...], out: Tensor) -> int:
    return args[0].numel()


def _product(position: int) -> Rule:
    """Return the rule of a matrix product, whose contracted axis is the last of one argument."""
    return lambda args, out: out.numel() * args[position].shape[-1]


def _affine(weight: int) -> Rule:
    """Return the rule of a norm: one per output element if it has a weight."""
    return lambda args, out: out[0].numel() if args[weight] is not None else 0


def _per_element(times: int) -> Rule:
    """Return the rule of an operator that costs `times` per output element."""
    return lambda args, out: times * out.numel()


MACS: dict[Any, Rule] = {
    aten.convolution.default: _count_convolution,
    aten.mm.default: _product(0),
    aten.bmm.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    aten.mv.default: _product(0),
    aten.dot.default: _count_dot,
}

# What the torchprofile convention adds to core.
_EXTRA: dict[Any, Rule] = {
    aten.mul.Tensor: _per_element(1),
    aten.mul.Scalar: _per_element(1),
    aten.mul_.Tensor: _per_element(1),
    aten.addcmul.default: _per_element(1),
    aten.native_layer_norm.default: _affine(2),
    aten.native_group_norm.default: _affine(1),
    aten.mean.dim: _per_element(1),
    aten._adaptive_avg_pool2d.default: _per_element(1),
    aten.avg_pool2d.default: _per_element(1),
    aten.leaky_relu.default: _per_element(1),
    aten.upsample_bilinear2d.default: _per_element(4),
}

_NORMS = {aten.native_layer_norm.default, aten.native_group_norm.default}


class MacCounter(TorchDispatchMode):
    """Count multiply-accumulates while it is active.

    core: by the core convention.
    extra: what the torchprofile convention adds.
    norms: output elements of all norms.
    sampling: of operations that only sample between pixels; in none of the above.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = 0
        self.extra = 0
        self.norms = 0
        self.sampling = 0

    def __enter__(self) -> MacCounter:
        self._hook = kernels.counting(self._closed_form)
        self._hook.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.__exit__(*error)

    @contextmanager
    def _closed_form(self, macs: int, sampling: bool) -> Iterator[None]:
        """Add an op's own count, and nothing that is seen while the op runs."""
        if sampling:
            self.sampling += macs
        else:
            self.core += macs
        core, extra = self.core, self.extra
        yield
        self.core, self.extra = core, extra

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))

        # Products count as core; normalisation and other arithmetic are kept apart.
        if func in MACS:
            self.core += MACS[func](args, out)
        elif func in _EXTRA:
            if func in _NORMS:
                self.norms += out[0].numel()
            self.extra += _EXTRA[func](args, out)
        elif "scaled_dot_product" in func.name():
            # A fused kernel is refused, since its products cannot be seen.
            raise RuntimeError(
                f"{func.name()} hides attention's products from the counter; "
                "count with the reference kernel"
            )

        return out


def count_network(model: nn.Module, size: int, channels: int) -> dict[str, int]:
    """Count a network on the meta device for one (channels, size, size) input."""
    x = torch.empty(1, channels, size, size, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    y = torch.zeros_like(t)

    # Some networks fuse weights when they leave training, once and not per image.
    model.eval()
    with counting() as macs:
        model(x, t, y)

    counts = count_parameters(model) | count_pass(macs)
    # Sampling between pixels stands apart, beside networks that have it.
    if macs.sampling:
        counts["macs_sampling"] = macs.sampling

    # Of the core, what a loop of steps does once for every caption.
    if isinstance(model, backbones.TextNetwork):
        with counting() as of_text:
            model.read(y)
        counts["macs_once_per_caption"] = of_text.core
    return counts


@contextmanager
def counting() -> Iterator[MacCounter]:
    """Count what runs, without gradients; explicit products keep attention in sight."""
    with torch.no_grad(), kernels.use(attention="reference"), MacCounter() as macs:
        yield macs


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return all and trained parameters of a network."""
    parameters = list(model.parameters())
    return {
        "params_total": sum(p.numel() for p in parameters),
        "params_trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def count_pass(macs: MacCounter) -> dict[str, int]:
    """Return the counts of one pass in every convention."""
    return {
        "macs_core": macs.core,
        "macs_torchprofile": macs.core + macs.extra,
        "macs_norms": macs.core + macs.norms,
    }


def count_backbone(spec: Cost) -> dict[str, int]:
    """Count a declared backbone."""
    options = spec.backbone.options | dict(
        input_size=spec.size, in_channels=spec.channels, num_classes=spec.num_classes
    )
    require_own_code(spec.backbone)
    with torch.device("meta"):
        model = backbones.build(spec.backbone.name, **options)
    return count_network(model, spec.size, spec.channels)
