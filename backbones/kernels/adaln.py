"""adaLN's LayerNorm without parameters, then shift and scale: x (N, T, D), shift and scale (N, 1, D) -> (N, T, D).

y = (x - mean x) / sqrt(var x + eps) (1 + scale) + shift, mean and variance over D (DiT, section 3.2).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.gates import addcmul
from backbones.kernels.op import Choice, Op, outside_graphs

EPS = 1e-6


def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


@outside_graphs
def triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    from backbones.kernels.adaln_triton import adaln as run

    return run(x, shift, scale, EPS)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels in Triton that compute in float32 take it."""
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and find_spec("triton") is not None
    )


def _supports(x: Tensor, shift: Tensor, scale: Tensor) -> bool:
    return (
        on_gpu(x)
        and x.ndim == 3
        and shift.shape == scale.shape == (len(x), 1, x.shape[-1])
        and x.shape[-1] <= 8192
    )


def unmeasured(*args: Tensor) -> bool:
    """No device has shown yet that the choice pays, so it is taken only by force."""
    return False


adaln = Op(
    "adaln", [Choice("triton", triton, _supports, unmeasured), Choice("reference", reference)]
)
