"""Measures of how local weights on a grid are, and their values for uniform weights.

A query is a token of an (H, W) grid. Its weights are non-negative and sum to 1 over the T = H W
tokens. Distances are Euclidean and counted in tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEASURES = ("distance", "field", "entropy")  # in tokens, tokens, nats
FIELD_SHARE = 0.9  # of a query's weight that its effective receptive field holds
ROUNDING = 1e-9  # slack of comparisons between sums of floats


def distances(grid: tuple[int, int], queries: Tensor) -> Tensor:
    """Return the distances from queries (R,) to all tokens in row-major order: (R, T), float64."""
    axes = (torch.arange(length, dtype=torch.float64, device=queries.device) for length in grid)
    row, column = torch.meshgrid(*axes, indexing="ij")
    row, column = row.flatten(), column.flatten()
    return torch.hypot(row[queries, None] - row, column[queries, None] - column)


def radii(grid: tuple[int, int]) -> Tensor:
    """Return 0, 1, 2, ... up to the radius of a disc around a corner that holds the grid."""
    diagonal = math.hypot(grid[0] - 1, grid[1] - 1)
    return torch.arange(math.ceil(diagonal) + 1, dtype=torch.float64)


def locality(weights: Tensor, distance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how local weights are.

    `distance` is the mean distance under the weights. `field` is the effective receptive field: the
    radius of the smallest disc around the query that holds FIELD_SHARE of its weight. `entropy` is
    in nats; its exponential is the effective number of tokens.

    Args:
        weights: (..., R, T).
        distance: of every query to every token, (R, T).
        within: radii (K,).

    Returns:
        The MEASURES (..., R, 3), and the mass within each radius (..., R, K).
    """
    # Sum each query's weights outwards, from the nearest token to the farthest.
    order = distance.argsort(dim=-1, stable=True)
    outward = distance.gather(-1, order)  # (R, T)
    held = weights.double().gather(-1, order.expand(weights.shape)).cumsum(-1)  # (..., R, T)

    # The mass within a radius is the sum over the tokens that its disc holds.
    limits = within.to(outward) + ROUNDING + torch.zeros_like(outward[:, :1])
    num_inside = torch.searchsorted(outward, limits)  # (R, K)
    mass = held.gather(-1, (num_inside - 1).expand(*held.shape[:-1], -1))

    # The field ends at the first token with which the sum reaches the wanted share.
    last = (held < FIELD_SHARE - ROUNDING).sum(-1).clamp(max=held.shape[-1] - 1)  # (..., R)
    field = outward.expand(held.shape).gather(-1, last[..., None])[..., 0]

    mean = (weights * distance).sum(-1)
    entropy = torch.special.entr(weights.double()).sum(-1)
    return torch.stack([mean, field, entropy], dim=-1), mass


def uniform(grid: tuple[int, int], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over queries for uniform weights: MEASURES (3,) and masses (K,)."""
    distance = distances(grid, queries)
    weights = torch.full_like(distance, 1 / distance.shape[-1])
    values, mass = locality(weights, distance, radii(grid).to(distance))
    return values.mean(0), mass.mean(0)
