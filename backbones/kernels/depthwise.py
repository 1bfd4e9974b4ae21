"""Depthwise k x k convolution, k odd, and exact GELU: x (N, C, H, W), weight (C, 1, k, k), bias (C,) -> (N, C, H, W).

DiCo's conv module (equation 3) runs it on tensors that memory bounds, where each pass counts.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.adaln import unmeasured
from backbones.kernels.op import Choice, Op


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)))


def triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from backbones.kernels.depthwise_triton import depthwise_gelu as run

    return run(x, weight, bias)


def _supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and find_spec("triton") is not None


depthwise_gelu = Op("depthwise_gelu", [Choice("triton", triton, _supports, unmeasured), Choice("reference", reference)])
