"""Rotary positions as complex numbers: neighbouring channels are one number, which turns.

Legend: T tokens, e channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel pairs, at least in float32: (..., T, e) by (T, e / 2)."""
    x_real = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(x_real.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def sequence_rotation(tokens: int, head_dim: int, device: torch.device) -> Tensor:
    """Build the unit complex numbers that turn pairs by the place in a sequence: (T, e / 2).

    The j-th pair of the token i turns by i 10000^(-2j/e), computed in float32.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)  # (e/2,)
    place = torch.arange(tokens, dtype=torch.float32, device=device)  # (T,)
    angles = place[:, None] / 10000 ** (pairs / head_dim)  # (T, e/2)
    return torch.complex(angles.cos(), angles.sin())
