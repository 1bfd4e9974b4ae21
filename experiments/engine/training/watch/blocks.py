"""What the blocks of a network do in a step: gradients, largest activations, saturated values.

A value is saturated if it has no room left. The output of a bounded function is, if it lies within
the spacing of its number type at 1 of a bound: its gradient vanishes there. Any other value is, if
its magnitude is above half of the largest number of its type: its double overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.engine.numerics.network_parts import list_parts
from experiments.engine.numerics.parts import norms_of

# The bounds of bounded functions.
BOUNDS: dict[type[nn.Module], tuple[float, float]] = {nn.Sigmoid: (0, 1), nn.Tanh: (-1, 1)}
COLUMNS = ("gradient_norm", "largest", "saturated")


@dataclass(frozen=True)
class Look:
    """One look at all parts of a network. Its numbers stay on the device until they are read."""

    # Counted from 1.
    step: int
    names: tuple[str, ...]
    # Norm of the whole gradient, 0-d.
    norm: Tensor
    # (P, 3): of each part the gradient's norm, the largest magnitude, the saturated share.
    table: Tensor

    def line(self) -> dict[str, Any]:
        """Return the look for a log. A number that is not finite is None."""
        blocks = {
            name: dict(zip(COLUMNS, map(_finite, row), strict=True))
            for name, row in zip(self.names, self.table.tolist(), strict=True)
        }
        return {"step": self.step, "gradient_norm": _finite(self.norm.item()), "blocks": blocks}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Watch:
    """Looks at the parts of a network: the gradients as they are, the values in a further pass.

    The pass is of its own, so that compiled steps and CUDA graphs stay what they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parts = list_parts(network)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        places = {id(p): place for place, p in enumerate(self.parameters)}
        self.owned = [
            [places[id(p)] for p in part.parameters() if p.requires_grad]
            for part in self.parts.values()
        ]

    def look(self, step: int, run: Callable[[], Any]) -> Look:
        """Return what the parts do in a step.

        Args:
            step: counted from 1.
            run: passes the images of the step through the network. Their gradients lie on its
                parameters.
        """
        tallies = [_Tally() for _ in self.parts]
        with _listening(self.parts.values(), tallies):
            run()

        # A part without gradients or values has zeros.
        device = self.parameters[0].device
        norms = self._norms()
        rows = [
            torch.stack([_norm_of(norms[owned]), *tally.numbers(device)])
            for owned, tally in zip(self.owned, tallies, strict=True)
        ]
        return Look(step, tuple(self.parts), _norm_of(norms), torch.stack(rows))

    def _norms(self) -> Tensor:
        """Return the norm of the gradient of each parameter, (K,)."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return norms_of(gradients)


def _norm_of(norms: Tensor) -> Tensor:
    return norms.square().sum().sqrt()


class _Tally:
    """What the modules of one part have put out so far."""

    def __init__(self) -> None:
        self.largest: list[Tensor] = []
        self.saturated: list[Tensor] = []
        self.total = 0

    def hear(self, module: nn.Module, _: Any, output: Any) -> None:
        """Take in the output of a module: a forward hook."""
        for values in tree_leaves(output):
            if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
                self._take(values.detach(), BOUNDS.get(type(module)))

    def _take(self, values: Tensor, bounds: tuple[float, float] | None) -> None:
        limits = torch.finfo(values.dtype)
        lowest, highest = values.aminmax()
        if bounds:
            lower, upper = bounds[0] + limits.eps, bounds[1] - limits.eps
        else:
            lower, upper = limits.min / 2, limits.max / 2
        self.largest.append(torch.maximum(-lowest, highest).float())
        self.total += values.numel()

        # A CPU knows at once that there is nothing to count.
        if values.is_cuda or lowest < lower or highest > upper:
            self.saturated.append(((values < lower) | (values > upper)).sum())

    def numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the largest magnitude and the share of saturated values, each 0-d."""
        zero = torch.zeros((), device=device)
        largest = torch.stack(self.largest).amax() if self.largest else zero
        saturated = torch.stack(self.saturated).sum() if self.saturated else zero
        return largest, saturated / max(1, self.total)


@contextmanager
def _listening(parts: Any, tallies: list[_Tally]) -> Iterator[None]:
    """Let a tally hear the outputs of each part: its own, and those of its innermost modules."""
    with ExitStack() as hooks:
        for part, tally in zip(parts, tallies, strict=True):
            for module in part.modules():
                if module is part or not any(True for _ in module.children()):
                    hooks.callback(module.register_forward_hook(tally.hear).remove)
        yield
