"""Linear layers whose weights are -1, 0 and 1 times one number (TerDiT, arXiv:2405.14854).

The training form keeps weights in full precision and rounds them in every forward pass. The packed
form keeps four rounded weights in a byte. Both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from backbones import kernels

SHIFTS = (6, 4, 2, 0)  # bits of a byte at which the four quarters of the rows lie
ZEROS = 0b01_01_01_01  # the byte of four weights that are 0
# The smallest alpha to start from: where weights start at zero, alpha must not, or neither moves.
LEAST_ALPHA = 0.01


def ternarise(weight: Tensor) -> Tensor:
    """Round a weight to -1, 0 and 1 in units of its mean size, at least in float32.

    Half a unit rounds to 0.
    """
    real = weight.to(torch.promote_types(weight.dtype, torch.float32))
    levels = (real / (real.abs().mean() + 1e-6)).round().clamp(-1, 1)
    return levels.to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """Compute alpha times the rounded weight, and pass gradients as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        levels = ternarise(weight)
        ctx.save_for_backward(levels, alpha)
        return alpha * levels.to(alpha.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        levels, alpha = ctx.saved_tensors
        grad_alpha = (grad * levels).sum().to(alpha.dtype)
        return (alpha * grad).to(levels.dtype), grad_alpha.view_as(alpha)


class TernaryLinear(nn.Linear):
    """Multiply by a weight that is rounded in every forward pass: (..., in) -> (..., out).

    The weight stays in float32 where the network turns to half precision. Half precision would
    move weights near half a unit to another level, and the packed form would compute other numbers.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.alphas = nn.Parameter(torch.ones(1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryLinear:
        """Apply a conversion to all tensors, and only its device to the weight if it is to half."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor is self.weight and converted.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(converted.device)
            return converted

        return super()._apply(convert, recurse)

    def init_alpha(self, alpha: str) -> None:
        """Draw alpha from N(0, 1) for "normal", or take the mean size of the weights."""
        if alpha == "normal":
            nn.init.normal_(self.alphas)
            return
        with torch.no_grad():
            self.alphas.copy_(self.weight.abs().mean().clamp(min=LEAST_ALPHA).view(1))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, _StraightThrough.apply(self.weight, self.alphas), self.bias)


class PackedLinear(nn.Module):
    """Multiply by a stored ternary weight, in the type of its alpha: (..., in) -> (..., out).

    `weight` (out / 4, in) holds bytes. It has no gradient.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        if out_features % 4:
            raise ValueError(
                f"packed weights lie in four equal parts: outputs must be divisible by 4, "
                f"got {out_features}"
            )
        shape = (out_features // 4, in_features)
        self.register_buffer("weight", torch.full(shape, ZEROS, dtype=torch.uint8))
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.alphas * (unpack(self.weight).to(self.alphas.dtype) - 1)
        return kernels.linear(x, weight, self.bias)


def pack(weight: Tensor) -> Tensor:
    """Store a ternary layer's weight with four numbers in a byte: (out, in) -> (out / 4, in)."""
    codes = (ternarise(weight) + 1).to(torch.uint8).chunk(4)
    packed = torch.zeros_like(codes[0])
    for code, shift in zip(codes, SHIFTS, strict=True):
        packed |= code << shift
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return the codes of a packed weight, 0 to 2 for -1 to 1: (out / 4, in) -> (out, in)."""
    return torch.cat([(packed >> shift) & 3 for shift in SHIFTS])


def list_ternary(weights: dict[str, Tensor]) -> list[str]:
    """List the names of the weights beside which an alpha lies."""
    layers = [name.removesuffix("alphas") for name in weights if name.endswith(".alphas")]
    return [f"{layer}weight" for layer in layers if f"{layer}weight" in weights]


def pack_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's weights with its ternary layers packed, those in bytes as they are.

    Raises:
        ValueError: If the file's bytes hold a code that this packing does not use.
    """
    packed = dict(weights)
    for name in list_ternary(weights):
        weight = weights[name]
        if weight.is_floating_point():
            packed[name] = pack(weight)
        elif weight.dtype != torch.uint8 or bool((unpack(weight) == 3).any()):
            raise ValueError(
                f"{name} was packed by another version: its bytes do not hold four numbers of "
                "0, 1 and 2; pack the unpacked weights again"
            )
    return packed
