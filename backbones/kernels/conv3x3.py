"""3x3 convolutions that keep the size: stride 1, padding 1.

x (N, C, H, W), weight (C_out, C, 3, 3), bias (C_out,) or None -> (N, C_out, H, W)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels import rows
from backbones.kernels.op import Choice, Op
from backbones.kernels.rows_linear import linear

# Products of a tile of Winograd's algorithm, as in conv3x3.c.
PLANES = 16
# Numbers between the end of one plane and the beginning of the next, as there.
GAP = 16
# Tiles whose products stay in the cache.
TILES = 96
# Channels of the input from which the products save more than the transforms cost.
ENOUGH = 12
# Channels of either side below which one product of all taps is faster.
FEW = 4

reference = partial(F.conv2d, padding=1)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n, c, h, w = x.shape
        o = len(weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        taps = x.new_empty(9 * c, o)
        y = x.new_empty(n, h, w, o).permute(0, 3, 1, 2)
        _call("forward", x, (x, weight, taps, bias, y), o)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        o = len(weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight)
        grad_bias = x.new_empty(o) if ctx.has_bias else None
        _call("backward", x, (x, weight, grad, grad_x, grad_weight, grad_bias), o)
        return grad_x, grad_weight, grad_bias


def _call(direction: str, x: Tensor, tensors: tuple[Tensor | None, ...], outputs: int) -> None:
    """Call the algorithm that takes the fewest products for images of this size."""
    n, c, h, w = x.shape
    sizes = (n, h, w, c, outputs)
    channels = (c, outputs)
    down, across = (h + 1) // 2, (w + 1) // 2
    if (3 * h - 2) * (3 * w - 2) <= PLANES * down * across:
        rows.call(f"neighbours_{direction}", *tensors, *sizes, channels=channels)
        return

    # The samples that are convolved at once, and the memory that conv3x3.c asks for them.
    samples = min(n, max(1, TILES // (down * across)))
    frames = 2 * (2 * down + 2) * (2 * across + 2) * c
    planes = samples * down * across * (c + outputs) + 2 * c * outputs + 4 * GAP
    scratch = x.new_empty(frames + PLANES * planes)
    scratch[:frames].zero_()
    name = f"winograd_{direction}"
    rows.call(name, *tensors, scratch, *sizes, samples, channels=channels)


class _Taps(torch.autograd.Function):
    """The surroundings of each pixel, (N, H, W, C) -> (N, H, W, 9C), or the transpose of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatters: bool) -> Tensor:
        ctx.scatters = scatters
        return _move_taps(x, scatters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _move_taps(grad.contiguous(), not ctx.scatters), None


def _move_taps(x: Tensor, scatters: bool) -> Tensor:
    *pixels, c = x.shape
    if scatters:
        y = x.new_empty(*pixels, c // 9)
        rows.call("scatter_taps", x, y, *pixels, c // 9, channels=())
    else:
        y = x.new_empty(*pixels, 9 * c)
        rows.call("gather_taps", x, y, *pixels, c, channels=())
    return y


def _convolve_few_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps = _Taps.apply(x.permute(0, 2, 3, 1), False)  # (N, H, W, 9C)
    return linear(taps, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def _convolve_few_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A pixel gives to its surroundings what they would take from it, from the opposite side.
    weight = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)  # (9 C_out, C)
    taps = linear(x.permute(0, 2, 3, 1), weight)  # (N, H, W, 9 C_out)
    y = _Taps.apply(taps, True)  # (N, H, W, C_out)
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with fewer products than one per tap and output, or all taps in one product."""
    outputs, inputs = weight.shape[:2]
    if inputs < FEW:
        return _convolve_few_inputs(x, weight, bias)
    if outputs < FEW:
        return _convolve_few_outputs(x, weight, bias)
    return _Conv3x3.apply(x, weight, bias)


def _supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return rows.is_image(x)


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return not FEW <= weight.shape[1] < ENOUGH and rows.pays()


conv3x3 = Op(
    "conv3x3",
    [Choice("rows", convolve, _supports, _pays), Choice("reference", reference)],
)
