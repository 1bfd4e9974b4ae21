"""Mamba, the token mixer of DiS, DiM and DiMSUM: Gu & Dao, 2023.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, and
github.com/state-spaces/mamba.

Legend: N batch, T tokens, D width, I = 2D inner width, S states per channel, R = ceil(D / 16) rank
of the step sizes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import causal_conv, selective_scan
from backbones.layers import Linear, zero_bias_


class Mamba(nn.Module):
    """Mix tokens causally, in their order: (N, T, D) -> same."""

    def __init__(self, dim: int, *, kernel: int = 4, states: int = 16) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner)
        self.x_proj = Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (N, I, T)
        y = selective_ssm(x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        return self.out_proj(y.transpose(1, 2))  # (N, T, D)


def selective_ssm(
    x: Tensor,
    z: Tensor,
    conv: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    a_log: Tensor,
    d: Tensor,
) -> Tensor:
    """Convolve, derive steps and matrices from the input, scan, and gate by z: (N, I, T) -> same.

    The bias of `dt_proj` is added in the scan.
    """
    rank, states = dt_proj.in_features, a_log.shape[1]
    x = causal_conv(x, conv.weight, conv.bias)  # (N, I, T)

    # The step sizes and both matrices depend on the input, and the decay rates do not.
    projected = x_proj(x.transpose(1, 2))  # (N, T, R + 2S)
    step, b, c = projected.split([rank, states, states], dim=-1)  # (N, T, R), 2 x (N, T, S)
    delta = F.linear(step, dt_proj.weight).transpose(1, 2)  # (N, I, T)
    a = -torch.exp(float32_or_wider(a_log))  # (I, S)

    return selective_scan(x, delta, a, b.transpose(1, 2), c.transpose(1, 2), d, z, dt_proj.bias)


# The orders in which a grid can be scanned: (by column, from the end).
ROWS = (False, False)
ROWS_BACK = (False, True)
COLUMNS = (True, False)
COLUMNS_BACK = (True, True)


def reorder(x: Tensor, grid: tuple[int, int], order: tuple[bool, bool]) -> Tensor:
    """Put the row-major tokens of a grid into another order: (N, H*W, D) -> same."""
    by_column, from_end = order
    if by_column:
        x = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return x.flip(1) if from_end else x


def restore(x: Tensor, grid: tuple[int, int], order: tuple[bool, bool]) -> Tensor:
    """Undo `reorder`."""
    by_column, from_end = order
    if from_end:
        x = x.flip(1)
    if by_column:
        x = x.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
    return x


def float32_or_wider(x: Tensor) -> Tensor:
    """Keep decay rates and residual streams in float32, which autocast would halve."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mamba_init(module: nn.Module, depth: int) -> None:
    """Draw the initial weights of the three families.

    Torch's defaults hold, except for zero biases, label tables from N(0, 0.02), output projections
    over sqrt(depth), and step sizes from 0.001 to 0.1.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            zero_bias_(layer)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
    for mixer in module.modules():
        if isinstance(mixer, Mamba):
            _init_mixer(mixer, depth)


@torch.no_grad()
def _init_mixer(mixer: Mamba, depth: int) -> None:
    bound = mixer.dt_proj.in_features**-0.5
    nn.init.uniform_(mixer.dt_proj.weight, -bound, bound)

    # The scan applies a softplus: store the value of which it makes the step size dt.
    bias = mixer.dt_proj.bias
    dt = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5)).div_(math.sqrt(depth))
