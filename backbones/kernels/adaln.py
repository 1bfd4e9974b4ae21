"""adaLN: LayerNorm without parameters, then shift and scale (DiT, section 3.2).

y = (x - mean x) / sqrt(var x + eps) (1 + scale) + shift, with mean and variance over D.
x (N, T, D), shift and scale (N, 1, D) -> (N, T, D).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels import rows
from backbones.kernels.gates import addcmul
from backbones.kernels.op import Choice, Op, never, outside_graphs

EPS = 1e-6
# A program of the Triton kernel holds a whole token in registers.
MOST_CHANNELS = 8192


def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise with PyTorch, then multiply and add."""
    return addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


@outside_graphs
def triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Run one Triton kernel forward and one backward."""
    from backbones.kernels.adaln_triton import adaln as fused_adaln

    return fused_adaln(x, shift, scale, EPS)


def in_rows(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Run one pass in C forward and one backward."""
    return rows.adaln(x, shift, scale, EPS)


def takes_triton(x: Tensor) -> bool:
    """Tell whether Triton kernels that compute in float32 can take a tensor."""
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and find_spec("triton") is not None
    )


def _supports(x: Tensor, shift: Tensor, scale: Tensor) -> bool:
    return (
        takes_triton(x)
        and x.ndim == 3
        and shift.shape == scale.shape == (len(x), 1, x.shape[-1])
        and x.shape[-1] <= MOST_CHANNELS
    )


adaln = Op(
    "adaln",
    [
        Choice("triton", triton, _supports, pays=never),
        Choice("rows", in_rows, rows.supports_adaln, rows.pays_in_threads),
        Choice("reference", reference),
    ],
)


def adaln2d(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the channels of each pixel, then shift and scale.

    Args:
        x: (N, C, H, W)
        shift: (N, C, 1, 1)
        scale: (N, C, 1, 1)
    """
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, HW, C), no copy if channels are last
    rows = adaln(rows, shift.flatten(1)[:, None], scale.flatten(1)[:, None])
    return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
