"""Per-sample depthwise convolution in Triton, channels last, forward and backward.

A program owns a block of pixels of one image and a block of channels, so that neighbouring threads
read neighbouring channels of x and of a tap. The gradient of the taps has a program for each tap of
each image, which walks over the pixels: nothing is added up by several programs, so the sums do not
depend on their order. All sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.launch import launch

# Pixels and channels of a program.
PIXELS, CHANNELS = 64, 64


@triton.jit
def _shifted(pointer, image, pixel, dy, dx, channel, H, W, C):
    """Load the values dy rows and dx columns away from pixels of an image, zero outside it."""
    row = pixel // W + dy
    column = pixel % W + dx
    inside = (pixel < H * W) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (image * H * W + row * W + column)[:, None] * C + channel[None, :]
    real = inside[:, None] & (channel < C)[None, :]
    return tl.load(pointer + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _correlate(
    x_ptr,
    taps_ptr,
    y_ptr,
    H,
    W,
    C,
    SIGN: tl.constexpr,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Correlate every image with its taps; SIGN -1 is the gradient of x."""
    blocks = tl.cdiv(H * W, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)

    y = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in range(K * K):
        at = (image * K * K + tap) * C + channel
        weight = tl.load(taps_ptr + at, mask=channel < C, other=0.0).to(tl.float32)
        dy = SIGN * (tap // K - K // 2)
        dx = SIGN * (tap % K - K // 2)
        y += weight[None, :] * _shifted(x_ptr, image, pixel, dy, dx, channel, H, W, C)

    at = (image * H * W + pixel)[:, None] * C + channel[None, :]
    real = (pixel < H * W)[:, None] & (channel < C)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit
def _backward_taps(
    x_ptr,
    grad_ptr,
    grad_taps_ptr,
    H,
    W,
    C,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = (tl.program_id(0) // (K * K)).to(tl.int64)
    tap = tl.program_id(0) % (K * K)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dy = tap // K - K // 2
    dx = tap % K - K // 2

    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, H * W, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        grad = _shifted(grad_ptr, image, pixel, 0, 0, channel, H, W, C)
        total += tl.sum(grad * _shifted(x_ptr, image, pixel, dy, dx, channel, H, W, C), axis=0)
    at = (image * K * K + tap) * C + channel
    tl.store(grad_taps_ptr + at, total.to(grad_taps_ptr.dtype.element_ty), mask=channel < C)


def _blocks(side: int) -> dict[str, int]:
    return dict(K=side, PIXELS=PIXELS, CHANNELS=CHANNELS)


def _launch(x: Tensor, taps: Tensor, side: int, sign: int) -> Tensor:
    n, c, height, width = x.shape
    y = torch.empty_like(x)
    grid = (n * triton.cdiv(height * width, PIXELS), triton.cdiv(c, CHANNELS))
    launch(_correlate, grid, x, taps, y, height, width, c, SIGN=sign, **_blocks(side))
    return y


class _SampleDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, side: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        taps = taps.contiguous()
        ctx.side = side
        ctx.save_for_backward(x, taps)
        return _launch(x, taps, side, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = _launch(grad, taps, ctx.side, -1)

        n, c, height, width = x.shape
        grad_taps = torch.empty_like(taps)
        grid = (n * ctx.side**2, triton.cdiv(c, CHANNELS))
        launch(_backward_taps, grid, x, grad, grad_taps, height, width, c, **_blocks(ctx.side))
        return grad_x, grad_taps, None


def sample_depthwise(x: Tensor, taps: Tensor, side: int) -> Tensor:
    """Convolve each channel of each sample with a kernel of its own."""
    return _SampleDepthwise.apply(x, taps, side)
