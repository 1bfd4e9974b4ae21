"""Parameters and multiply-accumulates of any backbone, counted on the meta device.

Conventions, all at batch 1 and in multiply-accumulates (what the paper calls Gflops):
`core` is every convolution, linear layer, matrix product and recurrence, attention's two included whichever kernel runs;
`torchprofile` is the paper's: core plus one per output element of every multiply, affine norm and pooling, four per
output element of a bilinear resize. A third, `norms`, is core plus one per output element of every norm: DiT's own table
and its ADM rows follow it.
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
from experiments.engine.specs.spec import Cost

aten = torch.ops.aten


def _conv(args: tuple[Any, ...], out: Tensor) -> int:
    weight = args[
        1
    ]  # (out, in/groups, k, k); transposed convolutions do not occur in these networks
    return out.numel() * math.prod(weight.shape[1:])


def _inner(position: int) -> Callable[[tuple[Any, ...], Tensor], int]:
    """A matrix product: output elements times the length of the contracted axis of argument `position`."""
    return lambda args, out: out.numel() * args[position].shape[-1]


MACS: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten.convolution.default: _conv,
    aten.mm.default: _inner(0),
    aten.bmm.default: _inner(0),
    aten.addmm.default: _inner(1),
    aten.baddbmm.default: _inner(1),
    aten.mv.default: _inner(0),
    aten.dot.default: lambda args, out: args[0].numel(),
}


def _affine(weight: int) -> Callable[[tuple[Any, ...], Any], int]:
    return lambda args, out: out[0].numel() if args[weight] is not None else 0


def _each(times: int) -> Callable[[tuple[Any, ...], Any], int]:
    return lambda args, out: times * out.numel()


_EXTRA: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten.mul.Tensor: _each(1),
    aten.mul.Scalar: _each(1),
    aten.mul_.Tensor: _each(1),
    aten.addcmul.default: _each(1),
    aten.native_layer_norm.default: _affine(2),
    aten.native_group_norm.default: _affine(1),
    aten.mean.dim: _each(1),
    aten._adaptive_avg_pool2d.default: _each(1),
    aten.avg_pool2d.default: _each(1),
    aten.leaky_relu.default: _each(1),
    aten.upsample_bilinear2d.default: _each(4),
}


_NORMS = {aten.native_layer_norm.default, aten.native_group_norm.default}


class MacCounter(TorchDispatchMode):
    """Adds up `core`, the `extra` terms of the torchprofile convention and the outputs of `norms` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.core = self.extra = self.norms = 0

    def __enter__(self) -> MacCounter:
        self._hook = kernels.counting(self._closed_form)
        self._hook.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.__exit__(*error)

    @contextmanager
    def _closed_form(self, macs: int) -> Iterator[None]:
        """An op's own count, in place of what is seen while it runs."""
        self.core += macs
        before = self.core, self.extra
        yield
        self.core, self.extra = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MACS:
            self.core += MACS[func](args, out)
        elif func in _EXTRA:
            self.norms += out[0].numel() if func in _NORMS else 0
            self.extra += _EXTRA[func](args, out)
        elif "scaled_dot_product" in func.name():
            raise RuntimeError(
                f"{func.name()} hides attention's products from the counter; count with the reference kernel"
            )
        return out


def count_network(model: nn.Module, size: int, channels: int) -> dict[str, int]:
    """Counts of a network on the meta device for one (channels, size, size) input.

    Attention runs as explicit products, so that none of it escapes.
    """
    x = torch.empty(1, channels, size, size, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    model.eval()  # before the counter starts: some networks fuse weights here, once and not per image
    with torch.no_grad(), kernels.use(attention="reference"), MacCounter() as macs:
        model(x, t, torch.zeros_like(t))
    parameters = list(model.parameters())
    return {
        "params_total": sum(p.numel() for p in parameters),
        "params_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "macs_core": macs.core,
        "macs_torchprofile": macs.core + macs.extra,
        "macs_norms": macs.core + macs.norms,
    }


def count_backbone(spec: Cost) -> dict[str, int]:
    """Counts of a declared backbone."""
    options = spec.backbone.options | dict(
        input_size=spec.size, in_channels=spec.channels, num_classes=spec.num_classes
    )
    with torch.device("meta"):
        model = backbones.build(spec.backbone.name, **options)
    return count_network(model, spec.size, spec.channels)
