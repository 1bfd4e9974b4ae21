"""Inception score, kernel distance and Monge distance of sets of features; nothing knows a network.

Shapes: N samples, M reference rows, d feature width, C classes.
Inception score: Salimans et al. 2016, split as in Dhariwal & Nichol 2021 (ADM).
KID: Bińkowski et al. 2018, eq. 4.
MIND: arXiv:2605.06797.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
import torch
from numpy import ndarray
from scipy.special import xlogy

from experiments.engine.scoring.frechet import jackknife
from experiments.engine.scoring.moments import as_rows

IS_BLOCK = 5000  # rows that ADM's evaluator takes together
IS_TENTHS = 10  # parts, each left out once for the error of the inception score
DIRECTIONS_AT_A_TIME = 100  # directions of MIND whose projections are held in memory together


def inception_score(probabilities: ndarray, block: int = IS_BLOCK) -> tuple[float, float]:
    """Return ADM's inception score, and the standard error of the whole set's score as one block.

    The score is the mean over consecutive blocks of exp(mean_i KL(p_i || mean p)); a short last
    block weighs the same. The error comes from leaving out one of ten consecutive parts at a time;
    it is nan below ten rows.

    Args:
        probabilities: (N, C) in file order; a file sorted by class scores far too low.
        block: rows per block.
    """
    n = len(probabilities)
    if n < 1 or block < 1:
        raise ValueError(
            f"need at least one row and a positive block, got {n} rows and block {block}"
        )
    scores = [_block_score([_sums(probabilities[i : i + block])]) for i in range(0, n, block)]
    value = float(np.mean(scores))
    if n < IS_TENTHS:
        return value, nan

    # The error is that of one block of all rows, by the jackknife over its tenths.
    tenths = [_sums(part) for part in np.array_split(probabilities, IS_TENTHS)]
    deleted = [_block_score(tenths[:j] + tenths[j + 1 :]) for j in range(IS_TENTHS)]
    sizes = [tenth.n for tenth in tenths]
    return value, jackknife(_block_score(tenths), deleted, sizes)[1]


def kid(
    *,
    samples: ndarray,
    reference: ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Return mean and standard deviation of the unbiased kernel distance over random subsets.

    The kernel is (x.y / d + 1)^3. Subsets are drawn as torch-fidelity draws them, from the samples
    and then from the reference. The deviation is that of one subset, not the error of the mean.

    Args:
        samples: rows (N, d).
        reference: rows (M, d).
        subsets: number of subsets.
        size: rows per subset.
        seed: of the subsets.
    """
    x, y = _same_width(samples, reference)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"need subsets >= 1 and 2 <= size <= rows, got {subsets} subsets of {size}, "
            f"rows {len(x)} and {len(y)}"
        )
    draw = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        a = x[draw.choice(len(x), size, replace=False)]
        b = y[draw.choice(len(y), size, replace=False)]

        # The mean within a set leaves out each row's kernel with itself, which makes it unbiased.
        within = [_cubic_kernel(part, part) for part in (a, b)]
        inner = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in within)
        values[i] = inner - 2 * _cubic_kernel(a, b).mean()
    return float(values.mean()), float(values.std())


def mind(
    *,
    samples: ndarray,
    reference: ndarray,
    directions: int = 10_000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> float:
    """Return the Monge Inception distance: how far the sorted projections of two sets lie apart.

    This is 3 d times the mean, over random unit directions u, of the squared 2-Wasserstein distance
    of samples.u and reference.u. The larger set is first thinned to as many rows as the other;
    rows and directions are drawn as torch-fidelity draws them. Two sets of one distribution are
    about d / N apart, so values compare only at the same number of rows.

    Args:
        samples: rows (N, d).
        reference: rows (M, d).
        directions: number of directions.
        seed: of the thinned rows and the directions.
        device: where the projections are sorted.
    """
    x, y = _same_width(samples, reference)
    n = min(len(x), len(y))
    dim = x.shape[1]
    if n < 1 or directions < 1:
        raise ValueError(
            f"need rows and directions, got {len(x)} and {len(y)} rows and {directions} directions"
        )

    # Thin the larger set, then draw the directions from the same stream.
    draw = torch.Generator().manual_seed(seed)
    thinned = []
    for rows in (x, y):
        if len(rows) > n:
            rows = rows[torch.randperm(len(rows), generator=draw)[:n].numpy()]
        thinned.append(torch.from_numpy(rows).to(device, torch.float32))
    a, b = thinned
    along = torch.randn(directions, dim, generator=draw)
    along /= along.norm(dim=1, keepdim=True)

    # In one dimension the optimal transport pairs the sorted values.
    gaps = []
    for u in along.to(device).T.split(DIRECTIONS_AT_A_TIME, 1):  # (d, directions at a time)
        gap = (a @ u).sort(0).values - (b @ u).sort(0).values  # (n, directions at a time)
        gaps.append(gap.square().mean(0))
    return float(3 * dim * np.mean(torch.cat(gaps).double().cpu().numpy()))


def proportion_se(share: float, n: int) -> float:
    """Return the binomial standard error sqrt(p (1 - p) / n) of a share of n independent trials."""
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"need n >= 1 and a share in [0, 1], got n {n} and share {share}")
    return sqrt(share * (1 - share) / n)


def _same_width(samples: ndarray, reference: ndarray) -> tuple[ndarray, ndarray]:
    """Return both in float64; ValueError unless they are finite rows of one width."""
    x = as_rows("samples", samples)
    y = as_rows("reference", reference)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}")
    return x, y


def _cubic_kernel(a: ndarray, b: ndarray) -> ndarray:
    k = a @ b.T / a.shape[1] + 1
    return k * k * k  # a power is many times slower


@dataclass(frozen=True)
class _Sums:
    """What the inception score needs of some rows."""

    # Number of rows.
    n: int
    # Sum of p log p over rows and classes.
    negentropy: float
    # Sum of the rows, (C,).
    total: ndarray


def _sums(probabilities: ndarray) -> _Sums:
    p = as_rows("probabilities", probabilities)
    if (p < 0).any() or (abs(p.sum(1) - 1) > 1e-3).any():
        raise ValueError("probabilities must be non-negative rows that sum to 1 within 1e-3")
    return _Sums(len(p), xlogy(p, p).sum(), p.sum(0))


def _block_score(parts: Sequence[_Sums]) -> float:
    """Return exp(mean_i KL(p_i || mean p)) over all rows of the parts."""
    n = sum(part.n for part in parts)
    negentropy = sum(part.negentropy for part in parts)
    mean = sum(part.total for part in parts) / n
    return float(np.exp(negentropy / n - xlogy(mean, mean).sum()))
