"""Causal depthwise convolution and SiLU, as in front of Mamba's scan: Gu & Dao, 2023, figure 3.

x (N, D, T), weight (D, 1, k) as in a depthwise Conv1d, bias (D,) -> silu(sum_j weight_j x_{t-k+1+j} + bias) (N, D, T).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.op import Choice, Op, outside_graphs


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Shifted copies of the input, weighted and added."""
    taps = weight.shape[-1]
    padded = F.pad(x, (taps - 1, 0))
    return F.silu(
        sum(weight[:, :, j] * padded[..., j : j + x.shape[-1]] for j in range(taps)) + bias[:, None]
    )


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(
        F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))[
            ..., : x.shape[-1]
        ]
    )


@outside_graphs
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.contiguous(), weight.squeeze(1), bias, activation="silu")


def shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An output that nothing was computed for."""
    return torch.empty_like(x)


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
        and _installed()
    )


causal_conv = Op(
    "causal_conv",
    [
        Choice("shape", shape, lambda x, *rest: x.is_meta),
        Choice("causal_conv1d", causal_conv1d, _supports),
        Choice("conv1d", conv1d),
        Choice("reference", reference),
    ],
    macs=lambda x, weight, bias: x.numel() * weight.shape[-1],
)
