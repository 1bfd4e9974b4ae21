"""Linear layers in C, alone and together with what stands before and after them: see rows.py.

Legend: N batch, T pixels, C, K and O channels, (H, W) grid with T = HW. Memory is channels-last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.rows import call, fits, is_image, supports_scale

# Channels of either side from which oneDNN multiplies: see `linear.WIDE`.
WIDE = 128
# Rows of a tile, as in rows.c.
TILE = 96

# Linear layers of rows: x (M, K), weight (O, K), bias (O,) or None -> (M, O)


def _is_narrow(weight: Tensor) -> bool:
    return min(weight.shape[:2]) < WIDE and weight.is_contiguous()


def supports_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether `linear` takes the tensors."""
    return _is_narrow(weight) and x.is_contiguous() and fits(x)


def supports_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether `pointwise` takes the tensors."""
    return _is_narrow(weight) and is_image(x)


class _Linear(torch.autograd.Function):
    """A linear layer of rows, or of the pixels of images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs, inputs = weight.shape[:2]
        m = x.numel() // inputs
        # A weight of four dimensions is that of a 1x1 convolution.
        y = _like(x, outputs) if weight.ndim == 4 else x.new_empty(*x.shape[:-1], outputs)
        sizes = (inputs, outputs)
        turned = x.new_empty(weight.numel())
        call("linear_forward", x, weight, turned, bias, y, m, *sizes, channels=sizes)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        outputs, inputs = weight.shape[:2]
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(outputs)
        tensors = (x, weight, grad, grad_x, grad_weight, grad_bias)
        sizes = (inputs, outputs)
        call("linear_backward", *tensors, x.numel() // inputs, *sizes, channels=sizes)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None


def _like(x: Tensor, channels: int) -> Tensor:
    """Return empty images with other channels: (N, K, H, W) -> (N, C, H, W)."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, channels).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the transposed weight."""
    return _Linear.apply(x, weight, bias)


# The two ends of a residual branch: x (N, C, H, W), shift, scale and gate (N, C, 1, 1)


def supports_enter(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Tell whether `enter` and `enter_gelu` take the tensors."""
    return supports_scale(x, shift) and shift.shape == scale.shape and _is_narrow(weight)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        n, c, h, w = x.shape
        t, o = h * w, len(weight)
        stride = scale.stride(0)
        if shift.stride(0) != stride or shift.stride(1) != 1 or scale.stride(1) != 1:
            shift, scale, stride = shift.contiguous(), scale.contiguous(), c
        y = _like(x, o)
        slope = torch.empty_like(y)
        mean = x.new_empty(n * t)
        rstd = x.new_empty(n * t)
        scratch = x.new_empty((TILE + t + o) * c)
        tensors = (x, shift, scale, weight, bias, y, slope, mean, rstd, scratch)
        call("enter_forward", *tensors, n, t, c, o, stride, eps, channels=(c, o))
        ctx.save_for_backward(x, shift, scale, weight, slope, mean, rstd)
        ctx.stride = stride
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight, slope, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        t, o = h * w, len(weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        grad_shift = x.new_empty(n, c, 1, 1)
        grad_scale = x.new_empty(n, c, 1, 1)
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(o)
        scratch = x.new_empty((TILE + t) * (2 * c + o))
        inputs = (x, shift, scale, weight, slope, mean, rstd, grad)
        outputs = (grad_x, grad_shift, grad_scale, grad_weight, grad_bias)
        sizes = (n, t, c, o)
        call("enter_backward", *inputs, *outputs, scratch, *sizes, ctx.stride, channels=(c, o))
        return *outputs[:4], grad_bias if ctx.has_bias else None, None


def enter_gelu(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Apply adaLN, a 1x1 convolution and GELU."""
    return _Enter.apply(x, shift, scale, weight, bias, eps)


def supports_leave(
    x: Tensor,
    gate: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> bool:
    """Tell whether `leave` takes the tensors."""
    fits = factor is None or supports_scale(h, factor)
    return fits and supports_scale(x, gate) and is_image(h) and _is_narrow(weight)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
    ) -> Tensor:
        n, c, height, width = x.shape
        t, k = height * width, h.shape[1]
        if gate.stride(1) != 1:
            gate = gate.contiguous()
        if factor is not None:
            factor = factor.contiguous()
        y = torch.empty_like(x)
        branch = torch.empty_like(x)
        scratch = x.new_empty((TILE + t + c) * k)
        tensors = (x, gate, h, factor, weight, bias, y, branch, scratch)
        call("leave_forward", *tensors, n, t, c, k, gate.stride(0), channels=(c, k))
        ctx.save_for_backward(gate, h, factor, weight, branch)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, h, factor, weight, branch = ctx.saved_tensors
        n, c, height, width = branch.shape
        t, k = height * width, h.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_gate = branch.new_empty(n, c, 1, 1)
        grad_h = torch.empty_like(h)
        grad_factor = None if factor is None else torch.empty_like(factor)
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(c)
        scratch = branch.new_empty((TILE + t) * (c + k))
        inputs = (gate, h, factor, weight, branch, grad)
        outputs = (grad_gate, grad_h, grad_factor, grad_weight, grad_bias)
        tensors = (*inputs, *outputs, scratch)
        call("leave_backward", *tensors, n, t, c, k, gate.stride(0), channels=(c, k))
        bias_part = grad_bias if ctx.has_bias else None
        return grad, grad_gate, grad_h, grad_weight, bias_part, grad_factor


def leave(
    x: Tensor,
    gate: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Add the gated 1x1 convolution of h, whose channels are first multiplied by a factor."""
    return _Leave.apply(x, gate, h, weight, bias, factor)
