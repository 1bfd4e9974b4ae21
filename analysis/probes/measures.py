"""How local weights on a grid are, each figure beside that of uniform weights.

A query is a token of an (H, W) grid; its weights are non-negative and sum to 1 over the T = H W tokens. Distances are
Euclidean, in tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEASURES = ("distance", "field", "entropy")  # tokens, tokens, nats
HELD = 0.9


def distances(grid: tuple[int, int], queries: Tensor) -> Tensor:
    """From queries (R,) to all tokens, row-major: (R, T), float64."""
    row, column = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64, device=queries.device) for side in grid),
        indexing="ij",
    )
    row, column = row.flatten(), column.flatten()
    return torch.hypot(row[queries, None] - row, column[queries, None] - column)


def radii(grid: tuple[int, int]) -> Tensor:
    """0, 1, 2, ... until a disc around a corner holds the grid."""
    return torch.arange(math.ceil(math.hypot(grid[0] - 1, grid[1] - 1)) + 1, dtype=torch.float64)


def locality(weights: Tensor, distance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., R, T) and distances (R, T) -> MEASURES (..., R, 3) and the mass within radii (K,): (..., R, K).

    distance: mean distance under the weights. field, the effective receptive field: radius of the smallest disc around
    the query that holds HELD of its weight. entropy: exp of it is the effective number of tokens.
    """
    order = distance.argsort(dim=-1, stable=True)
    outward = distance.gather(-1, order)  # (R, T)
    held = weights.double().gather(-1, order.expand(weights.shape)).cumsum(-1)  # (..., R, T)
    inside = torch.searchsorted(
        outward, within.to(outward) + 1e-9 + torch.zeros_like(outward[:, :1])
    )  # (R, K) tokens
    mass = held.gather(-1, (inside - 1).expand(*held.shape[:-1], -1))
    enough = (held < HELD - 1e-9).sum(-1).clamp(max=held.shape[-1] - 1)  # (..., R)
    field = outward.expand(held.shape).gather(-1, enough[..., None])[..., 0]
    mean = (weights * distance).sum(-1)
    entropy = torch.special.entr(weights.double()).sum(-1)
    return torch.stack([mean, field, entropy], dim=-1), mass


def uniform(grid: tuple[int, int], queries: Tensor) -> tuple[Tensor, Tensor]:
    """What uniform weights give, as means over these queries: MEASURES (3,) and masses (K,)."""
    distance = distances(grid, queries)
    values, mass = locality(
        torch.full_like(distance, 1 / distance.shape[-1]), distance, radii(grid).to(distance)
    )
    return values.mean(0), mass.mean(0)
