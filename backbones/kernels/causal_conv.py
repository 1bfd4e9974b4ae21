"""Causal depthwise convolution and SiLU, as before Mamba's scan (Gu & Dao, 2023, figure 3).

silu(sum_j weight_j x_{t-k+1+j} + bias).
x (N, D, T), weight (D, 1, k) as in a depthwise Conv1d, bias (D,) -> (N, D, T).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.launch import is_fake
from backbones.kernels.op import Choice, Op, meta_choice, outside_graphs


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Add weighted, shifted copies of the input."""
    taps, tokens = weight.shape[-1], x.shape[-1]
    padded = F.pad(x, (taps - 1, 0))
    total = sum(weight[:, :, j] * padded[..., j : j + tokens] for j in range(taps))
    return F.silu(total + bias[:, None])


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with padding on both sides, and drop what sees the future."""
    out = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))
    return F.silu(out[..., : x.shape[-1]])


@outside_graphs
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Call the library causal-conv1d."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.contiguous(), weight.squeeze(1), bias, activation="silu")


@cache
def _installed() -> bool:
    try:
        import causal_conv1d  # noqa: F401
    except ImportError:
        return False
    return True


def _supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and 2 <= weight.shape[-1] <= 4
        and not is_fake(x)
        and _installed()
    )


def _count_macs(x: Tensor, weight: Tensor, bias: Tensor) -> int:
    return x.numel() * weight.shape[-1]


causal_conv = Op(
    "causal_conv",
    [
        meta_choice(),
        Choice("causal_conv1d", causal_conv1d, _supports),
        Choice("conv1d", conv1d),
        Choice("reference", reference),
    ],
    macs=_count_macs,
)
