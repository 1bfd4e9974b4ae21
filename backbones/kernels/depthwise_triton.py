"""Depthwise convolution and GELU in Triton, channels last, forward and backward.

A program owns a block of pixels of the flattened (N, H, W) and a block of channels, so that
neighbouring threads read neighbouring channels. With z the convolution and y = z Phi(z),
dy/dz = Phi(z) + z phi(z). The backward pass computes z again, since it reads x for the weight's
gradient anyway. Sums over pixels leave one term per program and are added up outside.

DiCo's channel gate follows but is not included. It needs the mean over all pixels of an image, so
its product needs another launch, which reads y again in any case. Summing y here too would save
one of the five passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.launch import launch

# Pixels and channels of a program; with twice the pixels a thread's registers spill.
PIXELS, CHANNELS = 32, 64


@triton.jit
def _places(N, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Locate the program's values.

    Returns:
        Offsets in (N, H, W, C), rows, columns, channels, and which of them are real.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (pixel < N * H * W)[:, None] & (channel < C)[None, :]
    return pixel[:, None] * C + channel[None, :], (pixel // W) % H, pixel % W, channel, real


@triton.jit
def _neighbour(pointer, at, h, w, dy, dx, H, W, C, real):
    """Load the values dy rows and dx columns away, zero outside the image."""
    inside = ((h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W))[:, None] & real
    return tl.load(pointer + at + (dy * W + dx) * C, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight_ptr, channel, tap, C, K: tl.constexpr):
    """Load one tap of every channel's weight."""
    weight = tl.load(weight_ptr + channel * K * K + tap, mask=channel < C, other=0.0)
    return weight.to(tl.float32)


@triton.jit
def _convolve(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K: tl.constexpr):
    """Return z, the convolution and its bias."""
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    z = bias[None, :] + tl.zeros(at.shape, tl.float32)
    for tap in range(K * K):
        weight = _tap(weight_ptr, channel, tap, C, K)
        x = _neighbour(x_ptr, at, h, w, tap // K - K // 2, tap % K - K // 2, H, W, C, real)
        z += weight[None, :] * x
    return z


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    N,
    H,
    W,
    C,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    at, h, w, channel, real = _places(N, H, W, C, PIXELS, CHANNELS)
    z = _convolve(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K)
    y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit
def _backward_z(
    x_ptr,
    weight_ptr,
    bias_ptr,
    grad_ptr,
    grad_z_ptr,
    weight_terms,
    bias_terms,
    N,
    H,
    W,
    C,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    at, h, w, channel, real = _places(N, H, W, C, PIXELS, CHANNELS)
    z = _convolve(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K)

    # dy/dz, with 1 / sqrt(2) in the distribution and 1 / sqrt(2 pi) in the density.
    distribution = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    slope = distribution + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    grad_z = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32) * slope
    tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=real)

    # The program's terms of the gradients of bias and weight.
    term = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(bias_terms + term, tl.sum(grad_z, axis=0), mask=channel < C)
    for tap in range(K * K):
        x = _neighbour(x_ptr, at, h, w, tap // K - K // 2, tap % K - K // 2, H, W, C, real)
        tl.store(weight_terms + term * K * K + tap, tl.sum(grad_z * x, axis=0), mask=channel < C)


@triton.jit
def _backward_x(
    grad_z_ptr,
    weight_ptr,
    grad_x_ptr,
    N,
    H,
    W,
    C,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    at, h, w, channel, real = _places(N, H, W, C, PIXELS, CHANNELS)

    grad_x = tl.zeros(at.shape, tl.float32)
    for tap in range(K * K):
        # A pixel contributed to the outputs on the other side of the tap.
        weight = _tap(weight_ptr, channel, tap, C, K)
        dy = K // 2 - tap // K
        dx = K // 2 - tap % K
        grad_x += weight[None, :] * _neighbour(grad_z_ptr, at, h, w, dy, dx, H, W, C, real)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=real)


def _grid(x: Tensor) -> tuple[int, int]:
    """Return the number of programs: blocks of pixels, and blocks of channels."""
    return triton.cdiv(x.numel() // x.shape[1], PIXELS), triton.cdiv(x.shape[1], CHANNELS)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Return N, H, W, C."""
    n, c, h, w = x.shape
    return n, h, w, c


def _blocks(side: int) -> dict[str, int]:
    return dict(K=side, PIXELS=PIXELS, CHANNELS=CHANNELS)


class _DepthwiseGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.side = weight.shape[-1]
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.flatten(1).contiguous()  # (C, k k)
        y = torch.empty_like(x)
        launch(_forward, _grid(x), x, weight, bias, y, *_sizes(x), **_blocks(ctx.side))
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grid = _grid(x)
        blocks = _blocks(ctx.side)

        # Every block of pixels leaves one term for the gradients of weight and bias.
        grad_z, grad_x = torch.empty_like(x), torch.empty_like(x)
        weight_terms = x.new_empty(grid[0], *weight.shape, dtype=torch.float32)
        bias_terms = x.new_empty(grid[0], len(weight), dtype=torch.float32)
        terms = (weight_terms, bias_terms)
        launch(_backward_z, grid, x, weight, bias, grad, grad_z, *terms, *_sizes(x), **blocks)
        launch(_backward_x, grid, grad_z, weight, grad_x, *_sizes(x), **blocks)
        grad_weight = weight_terms.sum(0).to(weight.dtype).view(len(weight), 1, ctx.side, ctx.side)
        return grad_x, grad_weight, bias_terms.sum(0).to(bias.dtype)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel and apply GELU; shapes as in conv_gelu.py, channels last."""
    return _DepthwiseGelu.apply(x, weight, bias)
