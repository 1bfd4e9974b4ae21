"""Depthwise convolution and GELU in Triton on channels-last tensors, forward and backward.

A program owns a block of pixels of the flattened (N, H, W) and a block of channels, so that neighbouring threads read
neighbouring channels. z is the convolution, y = z Phi(z), dy/dz = Phi(z) + z phi(z); z is computed again in the backward
pass, which reads x for the weight's gradient anyway. Sums over pixels leave one term a program and are added up outside.
DiCo's channel gate, which follows, is not in the chain: it is made of the mean over all pixels of an image, so that its product needs
another launch, which reads y again, whatever this one does. Leaving y's sums here too would save one of the chain's five passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PIXELS, CHANNELS = 64, 64


@triton.jit
def _places(N, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of the program's values in (N, H, W, C), their row and column, and which are real."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (pixel < N * H * W)[:, None] & (channel < C)[None, :]
    return pixel[:, None] * C + channel[None, :], (pixel // W) % H, pixel % W, channel, real


@triton.jit
def _neighbour(pointer, at, h, w, dy, dx, H, W, C, real):
    """Values dy rows and dx columns away, zero outside the image."""
    inside = ((h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W))[:, None] & real
    return tl.load(pointer + at + (dy * W + dx) * C, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolved(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K: tl.constexpr):
    z = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :] + tl.zeros(
        at.shape, tl.float32
    )
    for tap in tl.static_range(K * K):
        weight = tl.load(weight_ptr + channel * K * K + tap, mask=channel < C, other=0.0).to(
            tl.float32
        )
        z += weight[None, :] * _neighbour(
            x_ptr, at, h, w, tap // K - K // 2, tap % K - K // 2, H, W, C, real
        )
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
    z = _convolved(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K)
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
    z = _convolved(x_ptr, weight_ptr, bias_ptr, at, h, w, channel, real, H, W, C, K)
    slope = (
        0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    )
    grad_z = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32) * slope
    tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=real)
    term = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(bias_terms + term, tl.sum(grad_z, axis=0), mask=channel < C)
    for tap in tl.static_range(K * K):
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
    for tap in tl.static_range(K * K):
        weight = tl.load(weight_ptr + channel * K * K + tap, mask=channel < C, other=0.0).to(
            tl.float32
        )
        grad_x += weight[None, :] * _neighbour(
            grad_z_ptr, at, h, w, K // 2 - tap // K, K // 2 - tap % K, H, W, C, real
        )
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=real)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.numel() // x.shape[1], PIXELS), triton.cdiv(x.shape[1], CHANNELS)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, h, w, c


class _DepthwiseGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight = x.contiguous(memory_format=torch.channels_last), weight.flatten(1).contiguous()
        ctx.side = round(weight.shape[1] ** 0.5)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _forward[_grid(x)](
                x, weight, bias, y, *_sizes(x), K=ctx.side, PIXELS=PIXELS, CHANNELS=CHANNELS
            )
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        grad, grid, blocks = (
            grad.contiguous(memory_format=torch.channels_last),
            _grid(x),
            dict(K=ctx.side, PIXELS=PIXELS, CHANNELS=CHANNELS),
        )
        grad_z, grad_x = torch.empty_like(x), torch.empty_like(x)
        weight_terms = x.new_empty(grid[0], *weight.shape, dtype=torch.float32)
        bias_terms = x.new_empty(grid[0], len(weight), dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward_z[grid](
                x, weight, bias, grad, grad_z, weight_terms, bias_terms, *_sizes(x), **blocks
            )
            _backward_x[grid](grad_z, weight, grad_x, *_sizes(x), **blocks)
        grad_weight = weight_terms.sum(0).to(weight.dtype).view(len(weight), 1, ctx.side, ctx.side)
        return grad_x, grad_weight, bias_terms.sum(0).to(bias.dtype)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _DepthwiseGelu.apply(x, weight, bias)
