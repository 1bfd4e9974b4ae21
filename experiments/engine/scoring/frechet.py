"""Fréchet distance of two sets of features, its sampling error and its finite-sample bias.

Shapes: N samples, d feature width. All arithmetic is float64.
Fréchet distance: Heusel et al. 2017, eq. 6.
Delete-a-group jackknife: Busing, Meijer & van der Leeden 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import nan, sqrt
from operator import add

import numpy as np
from numpy import ndarray

from experiments.engine.scoring.moments import Moments

CHUNK = 4096  # rows whose influences are computed at a time


def frechet(a: Moments, b: Moments) -> float:
    """Return |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2).

    The value is symmetric up to rounding, and can end a rounding error below 0.

    Raises:
        ValueError: below 2 samples, for different widths, or if the moments are not finite.
    """
    (mean1, cov1), (mean2, cov2) = _statistics(a, b)

    # The root's trace comes from eigenvalues, clipped at 0. n samples span at most n - 1
    # directions; the other eigenvalues are rounding, and their roots would add up.
    root = _matrix_root(cov1)
    rank = min(a.n, b.n, mean1.size + 1) - 1
    eigenvalues = np.linalg.eigvalsh(root @ cov2 @ root)[-rank:]
    cross = np.sqrt(eigenvalues.clip(0)).sum()

    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_influence(features: ndarray, sample: Moments, reference: Moments) -> ndarray:
    """Return psi (N,): how far each row pulls `frechet(sample, reference)`, up to a constant.

    psi_i = 2 (mu - mu_r).(x_i - mu) + (x_i - mu)^T (I - T)(x_i - mu), with
    T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2), the optimal map from S to S_r.

    Args:
        features: the rows (N, d) that `sample` was made of.
        sample: moments of the features.
        reference: moments that the features are compared with.
    """
    (mean, cov), (mean_r, cov_r) = _statistics(sample, reference)
    shape = (sample.n, mean.size)
    if np.shape(features) != shape:
        raise ValueError(
            f"features have shape {np.shape(features)}, the sample statistics say {shape}"
        )

    # T = half half^T. Directions outside the reference's span are left out: T is 0 there.
    root = _matrix_root(cov_r)
    values, vectors = np.linalg.eigh(root @ cov @ root)
    kept = values > mean.size * np.finfo(float).eps * values.max()
    half = root @ vectors[:, kept] / values[kept] ** 0.25

    # The quadratic form splits into |x|^2 - |half^T x|^2.
    psi = np.empty(sample.n)
    for i in range(0, sample.n, CHUNK):
        x = np.asarray(features[i : i + CHUNK], float) - mean
        linear = 2 * x @ (mean - mean_r)
        psi[i : i + CHUNK] = linear + np.square(x).sum(1) - np.square(x @ half).sum(1)
    return psi


def influence_se(psi: ndarray, labels: ndarray | None = None) -> float:
    """Return the first-order standard error sd(psi) / sqrt(N) of a value by its influences psi.

    With the difference of two models' psi over common seeds, this is the paired error of the
    difference of their values.

    Args:
        psi: influences (N,).
        labels: (N,), if the count of each class was fixed in advance, as in class-balanced sets;
            the deviation is then pooled within classes.
    """
    n = len(psi)
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels have shape {np.shape(labels)}, expected {(n,)}")

    # Without labels, all rows are one class.
    _, group = np.unique(np.zeros(n) if labels is None else labels, return_inverse=True)
    counts = np.bincount(group)
    if len(counts) == n:
        raise ValueError("every sample has its own label: no spread within classes to measure")

    centred = psi - (np.bincount(group, psi) / counts)[group]
    return sqrt(np.square(centred).sum() / (n - len(counts)) / n)


def frechet_se(
    features: ndarray, sample: Moments, reference: Moments, labels: ndarray | None = None
) -> float:
    """Return the standard error of `frechet(sample, reference)` over redraws of the samples.

    The reference is held fixed. The error vanishes with the distance itself. It is nan (not
    available) below N = 4 d. Labels are as in `influence_se`.
    """
    if len(features) < 4 * sample.mean.size:
        return nan
    return influence_se(frechet_influence(features, sample, reference), labels)


def frechet_jackknife(blocks: Sequence[Moments], reference: Moments) -> tuple[float, float]:
    """Return the distance of the blocks' union without its O(1/N) bias, and the standard error.

    Args:
        blocks: moments of exchangeable blocks (random rows, not one class each), of any sizes.
        reference: moments that the union is compared with.

    Raises:
        ValueError: below two blocks, or if a block is empty.
    """
    sizes = [block.n for block in blocks]
    if len(blocks) < 2 or min(sizes) < 1:
        raise ValueError(f"the jackknife needs at least 2 blocks with samples, got counts {sizes}")
    whole = frechet(reduce(add, blocks), reference)
    deleted = [
        frechet(reduce(add, [*blocks[:j], *blocks[j + 1 :]]), reference) for j in range(len(blocks))
    ]
    return jackknife(whole, deleted, sizes)


def jackknife(whole: float, deleted: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Return the bias-corrected value and its standard error by the delete-a-group jackknife.

    Args:
        whole: the value of all groups together.
        deleted: the values without each group in turn.
        sizes: the number of rows in each group.
    """
    ratio = sum(sizes) / np.array(sizes)
    pseudo = ratio * whole - (ratio - 1) * np.array(deleted)
    value = float((pseudo / ratio).sum())
    return value, sqrt((np.square(pseudo - value) / (ratio - 1)).mean())


def _statistics(a: Moments, b: Moments) -> list[tuple[ndarray, ndarray]]:
    """Return (mean, covariance) of both; ValueError unless they are finite and of one width."""
    if a.mean.size != b.mean.size:
        raise ValueError(f"feature widths differ: {a.mean.size} and {b.mean.size}")
    pairs = [(a.mean, a.cov), (b.mean, b.cov)]
    if not all(np.isfinite(mean).all() and np.isfinite(cov).all() for mean, cov in pairs):
        raise ValueError("feature statistics are not finite")
    return pairs


def _matrix_root(cov: ndarray) -> ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T
