"""Inputs of every timed operation, in the shapes of the networks that use it.

To add an operation: write the function that makes its inputs, and add it to CASES.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.engine.benchmarks.spec import DIM, TOKENS


def make_gated_linear(batch: int) -> list[Tensor]:
    """DiG-S/2's: 6 heads, e = 32, f = 64, decays of logits around zero."""
    heads, e = DIM // 64, 32
    q, k, logits = (torch.randn(batch, heads, TOKENS, e) for _ in range(3))
    v = torch.randn(batch, heads, TOKENS, 2 * e)
    return [q, k, v, F.logsigmoid(logits) / 16]


def make_diagonal_ssm(batch: int) -> list[Tensor]:
    """DiffuSSM's: 64 complex states a channel, A = -1/2 + i pi n, dt in [0.01, 1]."""
    a = torch.complex(torch.full((64,), -0.5), math.pi * torch.arange(64.0))
    dt = torch.empty(DIM, 1).uniform_(math.log(0.01), 0).exp()
    return [torch.randn(batch, DIM, TOKENS), dt * a, torch.randn(DIM, 64, dtype=torch.complex64)]


def make_selective_scan(batch: int) -> list[Tensor]:
    """Mamba's: twice the width in channels, 16 states, A = -1 to -16, steps around softplus(-3)."""
    channels, states = 2 * DIM, 16
    u, delta, z = (torch.randn(batch, channels, TOKENS) for _ in range(3))
    b, c = (torch.randn(batch, states, TOKENS) for _ in range(2))
    a = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return [u, delta, a, b, c, torch.ones(channels), z, torch.full((channels,), -3.0)]


def make_causal_conv(batch: int) -> list[Tensor]:
    """Mamba's: twice the width in channels, 4 taps."""
    channels = 2 * DIM
    x = torch.randn(batch, channels, TOKENS)
    return [x, torch.randn(channels, 1, 4) / 2, torch.zeros(channels)]


def make_linear_attention(batch: int) -> list[Tensor]:
    """Focused linear attention's: 12 heads of 32 features, none of them negative."""
    q, k, v = (torch.randn(batch, DIM // 32, TOKENS, 32) for _ in range(3))
    return [q.relu(), k.relu(), v]


def make_attention(batch: int) -> list[Tensor]:
    """DiT-S/2's: 6 heads of 64."""
    return [torch.randn(batch, DIM // 64, TOKENS, 64) for _ in range(3)]


def make_adaln(batch: int) -> list[Tensor]:
    """DiT-S/2's: a shift and a scale for each sample."""
    x = torch.randn(batch, TOKENS, DIM)
    return [x, torch.randn(batch, 1, DIM), torch.randn(batch, 1, DIM)]


def make_addcmul(batch: int) -> list[Tensor]:
    """DiCo's gated branch: a gate for each channel."""
    return [_make_image(batch), _make_image(batch)[..., :1, :1].clone(), _make_image(batch)]


def make_depthwise_gelu(batch: int) -> list[Tensor]:
    """DiCo's: 3x3, channels last, as many pixels as there are tokens elsewhere."""
    return [_make_image(batch), torch.randn(DIM, 1, 3, 3) / 3, torch.zeros(DIM)]


def make_pointwise(batch: int) -> list[Tensor]:
    """DiCo's: to twice the width."""
    weight = torch.randn(2 * DIM, DIM, 1, 1) / DIM**0.5
    return [_make_image(batch), weight, torch.zeros(2 * DIM)]


def make_sample_depthwise(batch: int) -> list[Tensor]:
    """DiCo-DWC's: a kernel of 9x9 for every channel of every sample, from 77 tokens of text."""
    return [_make_image(batch), torch.randn(batch, 81, DIM) / 9]


def _make_image(batch: int) -> Tensor:
    side = math.isqrt(TOKENS)
    return torch.randn(batch, DIM, side, side).contiguous(memory_format=torch.channels_last)


CASES: dict[str, Callable[[int], list[Tensor]]] = {
    "gated_linear": make_gated_linear,
    "selective_scan": make_selective_scan,
    "causal_conv": make_causal_conv,
    "attention": make_attention,
    "linear_attention": make_linear_attention,
    "diagonal_ssm": make_diagonal_ssm,
    "adaln": make_adaln,
    "addcmul": make_addcmul,
    "pointwise": make_pointwise,
    "depthwise_gelu": make_depthwise_gelu,
    "pointwise_gelu": make_pointwise,
    "sample_depthwise": make_sample_depthwise,
}
