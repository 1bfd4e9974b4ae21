"""Precision, recall, density and coverage of samples by nearest neighbours, on any torch device.

Precision and recall: Kynkäänniemi et al. 2019, eq. 1-2. Density and coverage: Naeem et al. 2020,
eq. 5-6. Shapes: N samples, M reference rows, d feature width.

The radius of a row's ball is the distance to its k-th nearest other row of the same set; a
duplicate counts as another row. As in the authors' code, balls are closed (distance <= radius)
for precision and recall, and open (distance < radius) for density and coverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from experiments.engine.numerics.precision import precision
from experiments.engine.scoring.moments import as_rows

NEIGHBOURS = 3  # k of every protocol
BLOCK = 2000  # rows of either set whose distances are held in memory together
ADM_BLOCK = 10_000  # the same in ADM's evaluator, whose results depend on it
REFINED_AT_A_TIME = 4096  # pairs whose distances are computed again at a time
DENSITY_BALL = "open"  # as manifests name it


@dataclass(frozen=True)
class Shares:
    """What `neighbour_shares` returns."""

    # Share of samples inside any reference ball.
    precision: float
    # Share of reference rows inside any sample ball.
    recall: float
    # Mean number of open reference balls that hold a sample, divided by k.
    density: float
    # Standard error of the density.
    density_se: float
    # Share of reference rows whose own open ball holds any sample.
    coverage: float


@dataclass(frozen=True)
class Block:
    """Squared distances between some rows of one set and some rows of another."""

    # Which rows of the first set, and of the second.
    rows: slice
    columns: slice
    # Squared distances as |a|^2 + |b|^2 - 2 a.b, one row per row of the first set.
    squared: Tensor
    # Bound on the difference between an entry of `squared` and the exact sum (a - b)^2.
    slack: float


def precision_recall(
    *,
    samples: ndarray,
    reference: ndarray,
    k: int = NEIGHBOURS,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return precision and recall of `neighbour_shares`."""
    shares = neighbour_shares(samples=samples, reference=reference, k=k, block=block, device=device)
    return shares.precision, shares.recall


def neighbour_shares(
    *,
    samples: ndarray,
    reference: ndarray,
    k: int = NEIGHBOURS,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
) -> Shares:
    """Return precision, recall, density and coverage, exact in float64.

    Args:
        samples: rows (N, d).
        reference: rows (M, d).
        k: number of neighbours that give the radius.
        block: rows per block; bounds memory at a few block x block and block x d arrays. The result
            does not depend on it, nor on the device.
        device: where the distances are computed.
    """
    fake, real = _on_device(samples, reference, k, block, device)
    radii_real = _squared_radii(real, k, block)
    radii_fake = _squared_radii(fake, k, block)

    inside_reference = torch.zeros(len(fake), dtype=torch.bool, device=device)
    inside_samples = torch.zeros(len(real), dtype=torch.bool, device=device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=device)
    open_balls = torch.zeros(len(fake), dtype=torch.long, device=device)
    for part in distance_blocks(real, fake, block):
        near = part.squared  # (reference rows, samples)
        reach_real = radii_real[part.rows, None]
        reach_fake = radii_fake[part.columns]

        # Rounding could decide pairs that lie close to a radius: compute those exactly.
        doubtful = (near - reach_real).abs() <= part.slack
        doubtful |= (near - reach_fake).abs() <= part.slack
        _refine(near, doubtful, real[part.rows], fake[part.columns])

        # Closed balls decide precision and recall.
        inside_reference[part.columns] |= (near <= reach_real).any(0)
        inside_samples[part.rows] |= (near <= reach_fake).any(1)

        # Open balls decide density and coverage.
        in_open_ball = near < reach_real
        open_balls[part.columns] += in_open_ball.sum(0)
        covered[part.rows] |= in_open_ball.any(1)

    density = open_balls.double() / k
    return Shares(
        precision=_share(inside_reference),
        recall=_share(inside_samples),
        density=density.mean().item(),
        density_se=(density.std() / len(fake) ** 0.5).item(),
        coverage=_share(covered),
    )


def precision_recall_half(
    *,
    samples: ndarray,
    reference: ndarray,
    k: int = NEIGHBOURS,
    block: int = ADM_BLOCK,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return precision and recall in approximately the arithmetic of ADM's evaluator.

    The values come out 0.0005 to 0.003 higher. Features, norms, products and sums are rounded to
    half precision, which makes ties, and a tie is a hit. The k-th neighbour is counted among all
    rows, the centre included. A block with a value that is not finite is computed again in single
    precision, so the result depends on `block`.
    """
    fake, real = (x.float() for x in _on_device(samples, reference, k, block, device))
    with precision("fp32", real.device):
        radii_real = _half_radii(real, k, block)
        radii_fake = _half_radii(fake, k, block)

        # A point is inside a set if it lies within the radius of any of the set's points.
        inside_reference = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
        inside_samples = torch.zeros(len(real), dtype=torch.bool, device=real.device)

        # The distances are computed block by block, and each block serves both sets.
        for i in range(0, len(real), block):
            rows = slice(i, i + block)
            for j in range(0, len(fake), block):
                columns = slice(j, j + block)
                near = _half_distances(real[rows], fake[columns])
                inside_reference[columns] |= (near <= radii_real[rows, None]).any(0)
                inside_samples[rows] |= (near <= radii_fake[columns]).any(1)

    return _share(inside_reference), _share(inside_samples)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _on_device(
    samples: ndarray, reference: ndarray, k: int, block: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return samples and reference on the device; ValueError where they or k do not fit."""
    real = as_rows("reference", reference)
    fake = as_rows("samples", samples)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {fake.shape[1]}")
    if block < 1 or not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"need block >= 1 and 1 <= k < rows, got block {block}, k {k}, "
            f"rows {len(real)} and {len(fake)}"
        )
    return torch.from_numpy(fake).to(device), torch.from_numpy(real).to(device)


def distance_blocks(a: Tensor, b: Tensor, block: int) -> Iterator[Block]:
    """Yield the squared distances of all pairs, block by block.

    This formula and the sum (a - b)^2 are each within 2 (d + 4) u (|a|^2 + |b|^2) of the truth in
    any order of summation, u = 2^-53. The slack has twice the room of both together.
    """
    for i in range(0, len(a), block):
        rows = slice(i, i + block)
        for j in range(0, len(b), block):
            columns = slice(j, j + block)
            aa = a[rows].square().sum(1, keepdim=True)
            bb = b[columns].square().sum(1)
            squared = torch.addmm(aa + bb, a[rows], b[columns].T, alpha=-2)
            slack = 4 * (a.shape[1] + 4) * np.finfo(float).eps * (aa.max() + bb.max()).item()
            yield Block(rows, columns, squared, slack)


def _refine(near: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> None:
    """Replace the masked entries by sum (a - b)^2, which depends on the two rows alone."""
    rows, columns = mask.nonzero(as_tuple=True)
    pairs = zip(rows.split(REFINED_AT_A_TIME), columns.split(REFINED_AT_A_TIME), strict=True)
    for r, c in pairs:
        near[r, c] = (a[r] - b[c]).square().sum(1)


def _squared_radii(x: Tensor, k: int, block: int) -> Tensor:
    """Return the squared distance from each row to its k-th nearest other row, (n,)."""
    nearest = torch.full((len(x), k), torch.inf, dtype=x.dtype, device=x.device)
    for part in distance_blocks(x, x, block):
        near = part.squared
        if part.rows == part.columns:
            near.fill_diagonal_(torch.inf)  # a row is no neighbour of itself

        # Only entries that can be among the k nearest are computed exactly.
        limit = nearest[part.rows, -1]
        if near.shape[1] >= k:
            kth = near.topk(k, largest=False).values[:, -1]
            limit = torch.minimum(limit, kth + part.slack)
        candidates = near <= (limit + part.slack)[:, None]
        _refine(near, candidates & near.isfinite(), x[part.rows], x[part.columns])
        near[~candidates] = torch.inf

        # Keep the k nearest of the earlier blocks and this one.
        merged = torch.cat([nearest[part.rows], near], 1)
        nearest[part.rows] = merged.topk(k, largest=False).values
    return nearest[:, -1]


def _half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances by half-precision steps, as float32.

    They are computed wholly in float32 if one of them is not finite.
    """
    u, v = a.half(), b.half()
    uu = u.square().float().sum(1).half()[:, None]
    vv = v.square().float().sum(1).half()
    near = uu - 2 * (u.float() @ v.float().T).half() + vv
    if not near.isfinite().all():
        return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp_min_(0)
    return near.clamp_min_(0).float()


def _half_radii(x: Tensor, k: int, block: int) -> Tensor:
    """Return each row's distance to the k-th nearest other row; the row itself is counted too."""
    radii = torch.empty(len(x), device=x.device)
    for i in range(0, len(x), block):
        nearest = []
        for j in range(0, len(x), block):
            near = _half_distances(x[i : i + block], x[j : j + block])
            nearest.append(near.topk(min(k + 1, near.shape[1]), largest=False).values)
        radii[i : i + block] = torch.cat(nearest, 1).topk(k + 1, largest=False).values[:, -1]
    return radii
