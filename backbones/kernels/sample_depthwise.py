"""A depthwise convolution whose kernels belong to the sample (DiCo, version 2, algorithm 1).

y[n, c, i, j] = sum over (a, b) of taps[n, a k + b, c] x[n, c, i + a - k div 2, j + b - k div 2].
x (N, C, H, W), taps (N, k k, C) with odd k -> (N, C, H, W). Pixels outside the image are zero.

The taps lie as tokens do: token i of a caption is tap (i div k, i mod k) of every channel's kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.adaln import takes_triton
from backbones.kernels.op import Choice, Op, outside_graphs


def side_of(taps: Tensor) -> int:
    """Return the side k of the kernels; ValueError if the taps fill no odd square."""
    side = math.isqrt(taps.shape[1])
    if side**2 != taps.shape[1] or side % 2 == 0:
        raise ValueError(
            f"a kernel needs an odd square of taps such as 9 or 81, got {taps.shape[1]}; "
            "repeat the last one"
        )
    return side


def reference(x: Tensor, taps: Tensor) -> Tensor:
    """Add weighted, shifted copies of the input, at least in float32."""
    side = side_of(taps)
    height, width = x.shape[-2:]
    real = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(real), [side // 2] * 4)
    out = torch.zeros_like(x, dtype=real)
    for i, tap in enumerate(taps.to(real).unbind(1)):
        row, column = divmod(i, side)
        out = out + tap[..., None, None] * padded[..., row : row + height, column : column + width]
    return out.to(x.dtype)


def grouped(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve once, with a group for every channel of every sample."""
    side = side_of(taps)
    n, c, height, width = x.shape
    weight = taps.transpose(1, 2).reshape(n * c, 1, side, side)
    groups = x.reshape(1, n * c, height, width)
    return F.conv2d(groups, weight, padding=side // 2, groups=n * c).view(n, c, height, width)


@outside_graphs
def triton(x: Tensor, taps: Tensor) -> Tensor:
    """Run one Triton kernel forward and two backward, channels last."""
    from backbones.kernels.sample_depthwise_triton import sample_depthwise as fused

    return fused(x, taps, side_of(taps))


def _supports_triton(x: Tensor, taps: Tensor) -> bool:
    return takes_triton(x) and takes_triton(taps)


def count_macs(x: Tensor, taps: Tensor) -> int:
    """Count one per tap and output element."""
    return x.numel() * taps.shape[1]


sample_depthwise = Op(
    "sample_depthwise",
    [
        Choice("triton", triton, _supports_triton),
        Choice("grouped", grouped),
        Choice("reference", reference),
    ],
    macs=count_macs,
)
