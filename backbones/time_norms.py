"""Norms whose parameters depend on time: DiMR (arXiv:2406.09416).

Legend: N batch, D channels, s time of each sample, from -1 (no noise) to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels


class TimeParameter(nn.Module):
    """A vector that moves from param1 to param0 as noise grows: time (N,) -> (N, D).

    It is p1 + sigmoid(s (1 + w) + b) (p0 - p1). The authors exempt w and b from weight decay.
    """

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), start))
        self.param1 = nn.Parameter(torch.full((dim,), start))
        self.nodecay_weight = nn.Parameter(torch.zeros(dim))
        self.nodecay_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, s: Tensor) -> Tensor:
        slope = 1 + self.nodecay_weight  # (D,)
        share = kernels.addcmul(self.nodecay_bias, s[:, None], slope).sigmoid()  # (N, D)
        return kernels.addcmul(self.param1, share, self.param0 - self.param1)  # (N, D)


def _broadcast(parameter: Tensor, x: Tensor) -> Tensor:
    """Give (N, D) the axes of x (N, ..., D)."""
    return parameter.view(len(parameter), *(1,) * (x.ndim - 2), -1)


class TimeRMSNorm(nn.Module):
    """Divide by the root mean square of the channels, times a gain of time: (N, ..., D) -> same.

    The authors add eps to the root, not under it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = TimeParameter(dim, 1.0)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (N, ..., 1)
        root = norm * x.shape[-1] ** -0.5
        return x / (root + 1e-8) * _broadcast(self.scale(s), x)


class TimeLayerNorm(nn.Module):
    """Normalise the channels, with weight and bias of time: (N, ..., D) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = TimeParameter(dim, 1.0)
        self.bias = TimeParameter(dim, 0.0)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-5)
        weight, bias = _broadcast(self.weight(s), x), _broadcast(self.bias(s), x)
        return kernels.addcmul(bias, normed, weight)
