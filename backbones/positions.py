"""Positions of tokens: fixed ones, and learned ones at another size.

A family that has learned ones interpolates them in `resized`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_position(dim: int, grid: tuple[int, int]) -> Tensor:
    """Build DiT's fixed 2-D position embedding: (1, T, dim).

    The first half encodes the column and the second half the row. Each half is
    [sin(pos w), cos(pos w)] with w_j = 10000^(-4j/dim), computed in float64.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for position in (column, row):
        angles = np.outer(position.reshape(-1), frequencies)  # (T, dim/4)
        halves += [np.sin(angles), np.cos(angles)]
    return torch.tensor(np.concatenate(halves, axis=1), dtype=torch.float32)[None]


def resize_positions(table: Tensor, side: int, leading: int = 0) -> Tensor:
    """Interpolate the rows of a square grid bilinearly: (..., S, D) -> (..., leading + side^2, D).

    Args:
        table: positions, row-major, after `leading` ones that belong to no place in the grid.
        side: of the new grid.
        leading: rows that are kept as they are.

    Raises:
        ValueError: If the other rows are no square grid.
    """
    first, places = table[..., :leading, :], table[..., leading:, :]
    old = math.isqrt(places.shape[-2])
    if old * old != places.shape[-2] or not old:
        raise ValueError(
            f"{table.shape[-2]} positions are not {leading} and those of a square grid; "
            "these weights are of another network"
        )

    # A grid of its own size keeps its bits.
    if old == side:
        return table
    grid = places.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    rows = grid.flatten(2).transpose(1, 2).reshape(*places.shape[:-2], side * side, -1)
    return torch.cat([first, rows], dim=-2)


class PositionTable(nn.Module):
    """Add a learned row per cell, row-major: (N, D, g, g) -> (N, g, g, D)."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.position_embeddings = nn.ParameterDict({"weight": torch.zeros(grid * grid, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return x + self.position_embeddings["weight"].view(x.shape[1:])
