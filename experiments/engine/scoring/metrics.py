"""Distances between sets of features, each with its sampling error. All arithmetic is float64; nothing here knows a network.

Shapes: n samples, m reference points, d feature width, C classes.  u = 2^-53 is the unit round-off.
Fréchet distance: Heusel et al. 2017, eq. 6.  Inception score: Salimans et al. 2016, split as in Dhariwal & Nichol 2021 (ADM).
KID: Bińkowski et al. 2018, eq. 4.  Delete-a-group jackknife: Busing, Meijer & van der Leeden 1999.
"""

from collections.abc import Sequence
from functools import reduce
from math import nan, sqrt
from operator import add

import numpy as np
import torch
from numpy import ndarray
from scipy.special import xlogy

IS_BLOCK = 5000  # rows that ADM's evaluator takes together


class Moments:
    """Count `n`, `mean` (d,) and `scatter` (d, d) = sum (x - mean)(x - mean)^T of the rows seen so far.

    Batches and sets are merged about their own means (Chan, Golub & LeVeque 1979), so no large sums cancel.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @classmethod
    def known(cls, mean: ndarray, cov: ndarray) -> "Moments":
        """Statistics whose count is not known: it is taken as large, and by a power of two, so that `cov` comes back as it is."""
        known = cls(len(mean))
        known.n, known.mean, known.scatter = 2**30 + 1, mean, cov * 2.0**30
        return known

    @property
    def cov(self) -> ndarray:
        """Covariance (d, d), divided by n - 1. ValueError below two samples."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: ndarray) -> None:
        """Add rows (b, d) of any real type; ValueError unless finite."""
        x = rows("features", features)
        batch = Moments(x.shape[1])
        if len(x):
            batch.n, batch.mean = len(x), x.mean(0)
            x = x - batch.mean
            batch.scatter = x.T @ x
        self._absorb(batch)

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(self.mean.size)
        total._absorb(self)
        total._absorb(other)
        return total

    def _absorb(self, other: "Moments") -> None:
        if self.mean.size != other.mean.size:
            raise ValueError(f"feature widths differ: {self.mean.size} and {other.mean.size}")
        if other.n:
            n, gap = self.n + other.n, other.mean - self.mean
            self.scatter = (
                self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n)
            )
            self.mean = self.mean + gap * (other.n / n)
            self.n = n


def frechet(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2), the root by eigenvalues clipped at 0.

    Symmetric up to rounding, and may end a rounding error below 0. ValueError: under 2 samples, other width, not finite.
    """
    (mean1, cov1), (mean2, cov2) = _statistics(a, b)
    root = _root(cov1)
    rank = (
        min(a.n, b.n, mean1.size + 1) - 1
    )  # at most: fewer samples leave eigenvalues of rounding alone, whose roots would add up
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root)[-rank:].clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_influence(features: ndarray, sample: Moments, reference: Moments) -> ndarray:
    """psi (n,): how far each of the rows `sample` was made of pulls `frechet(sample, reference)`, up to a constant.

    psi_i = 2 (mu - mu_r).(x_i - mu) + (x_i - mu)^T (I - T)(x_i - mu), and
    T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2) the optimal map from S to S_r.
    """
    (mean, cov), (mean_r, cov_r) = _statistics(sample, reference)
    n, dim = sample.n, mean.size
    if np.shape(features) != (n, dim):
        raise ValueError(
            f"features have shape {np.shape(features)}, the sample statistics say {(n, dim)}"
        )
    root = _root(cov_r)
    values, vectors = np.linalg.eigh(root @ cov @ root)
    kept = (
        values > dim * np.finfo(float).eps * values.max()
    )  # the others lie outside the reference's span, where T is 0
    half = root @ vectors[:, kept] / values[kept] ** 0.25  # T = half half^T
    psi = np.empty(n)
    for i in range(0, n, 4096):
        x = np.asarray(features[i : i + 4096], float) - mean
        psi[i : i + 4096] = (
            2 * x @ (mean - mean_r) + np.square(x).sum(1) - np.square(x @ half).sum(1)
        )
    return psi


def influence_se(psi: ndarray, labels: ndarray | None = None) -> float:
    """Standard error sd(psi) / sqrt(n) of the value whose influences psi (n,) are. First order.

    labels (n,) say that each class's count was fixed in advance, as in class-balanced sets: the sd is then pooled within
    classes. With the difference of two models' psi over common seeds this is the paired error of their difference.
    """
    n = len(psi)
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels have shape {np.shape(labels)}, expected {(n,)}")
    _, group = np.unique(np.zeros(n) if labels is None else labels, return_inverse=True)
    counts = np.bincount(group)
    if len(counts) == n:
        raise ValueError("every sample has its own label: no spread within classes to measure")
    centred = psi - (np.bincount(group, psi) / counts)[group]
    return sqrt(np.square(centred).sum() / (n - len(counts)) / n)


def frechet_se(
    features: ndarray, sample: Moments, reference: Moments, labels: ndarray | None = None
) -> float:
    """Standard error of `frechet(sample, reference)` over redraws of the samples, the reference held fixed.

    It vanishes with the distance itself. nan (not available) below n = 4 d; labels as in `influence_se`.
    """
    if len(features) < 4 * sample.mean.size:
        return nan
    return influence_se(frechet_influence(features, sample, reference), labels)


def frechet_jackknife(blocks: Sequence[Moments], reference: Moments) -> tuple[float, float]:
    """Fréchet distance of the blocks' union with its O(1/n) bias removed, and the standard error, by deleting one block at a time.

    Blocks must be exchangeable (random rows, not one class each); they may differ in size.
    """
    if len(blocks) < 2 or any(block.n < 1 for block in blocks):
        raise ValueError(
            f"the jackknife needs at least 2 blocks with samples, got counts {[block.n for block in blocks]}"
        )
    deleted = [
        frechet(reduce(add, [*blocks[:j], *blocks[j + 1 :]]), reference) for j in range(len(blocks))
    ]
    return _jackknife(
        frechet(reduce(add, blocks), reference), deleted, [block.n for block in blocks]
    )


def inception_score(probabilities: ndarray, block: int = IS_BLOCK) -> tuple[float, float]:
    """ADM's score: mean over consecutive blocks of rows of exp(mean_i KL(p_i || mean p)); a short last block weighs the same.

    probabilities (n, C) are in file order: a file sorted by class scores far too low. The second value is the standard error
    of the score of the whole set as one block, by deleting one of ten consecutive blocks at a time; nan below ten rows.
    """
    n = len(probabilities)
    if n < 1 or block < 1:
        raise ValueError(
            f"need at least one row and a positive block, got {n} rows and block {block}"
        )
    value = float(
        np.mean([_score([_sums(probabilities[i : i + block])]) for i in range(0, n, block)])
    )
    if n < 10:
        return value, nan
    tenths = [_sums(part) for part in np.array_split(probabilities, 10)]
    deleted = [_score(tenths[:j] + tenths[j + 1 :]) for j in range(10)]
    return value, _jackknife(_score(tenths), deleted, [tenth[0] for tenth in tenths])[1]


def kid(
    samples: ndarray, reference: ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel distance, kernel (x.y / d + 1)^3, unbiased: mean and standard deviation over random subsets of `size` rows.

    Subsets are drawn as torch-fidelity draws them, from the samples and then from the reference. The deviation is that of
    one subset's value, not the error of the mean.
    """
    x, y = rows("samples", samples), rows("reference", reference)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}")
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"need subsets >= 1 and 2 <= size <= rows, got {subsets} subsets of {size}, rows {len(x)} and {len(y)}"
        )
    draw, values = np.random.RandomState(seed), np.empty(subsets)
    for i in range(subsets):
        a, b = (
            x[draw.choice(len(x), size, replace=False)],
            y[draw.choice(len(y), size, replace=False)],
        )
        within = [_cubic(part, part) for part in (a, b)]
        values[i] = (
            sum((k.sum() - k.trace()) / (size * (size - 1)) for k in within)
            - 2 * _cubic(a, b).mean()
        )
    return float(values.mean()), float(values.std())


def proportion_se(share: float, n: int) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of a share of n independent trials."""
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"need n >= 1 and a share in [0, 1], got n {n} and share {share}")
    return sqrt(share * (1 - share) / n)


def rows(name: str, x: ndarray) -> ndarray:
    """The array in float64; ValueError unless it is (n, d) and finite."""
    x = np.asarray(x, float)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"{name} must be rows (n, d) of finite numbers, got shape {x.shape}")
    return x


def _statistics(a: Moments, b: Moments) -> list[tuple[ndarray, ndarray]]:
    if a.mean.size != b.mean.size:
        raise ValueError(f"feature widths differ: {a.mean.size} and {b.mean.size}")
    pairs = [(m.mean, m.cov) for m in (a, b)]
    if not all(np.isfinite(part).all() for pair in pairs for part in pair):
        raise ValueError("feature statistics are not finite")
    return pairs


def _root(cov: ndarray) -> ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def _cubic(a: ndarray, b: ndarray) -> ndarray:
    k = a @ b.T / a.shape[1] + 1
    return k * k * k  # a power is many times slower


def _jackknife(whole: float, deleted: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    ratio = sum(sizes) / np.array(sizes)
    pseudo = ratio * whole - (ratio - 1) * np.array(deleted)
    value = float((pseudo / ratio).sum())
    return value, sqrt((np.square(pseudo - value) / (ratio - 1)).mean())


def _sums(probabilities: ndarray) -> tuple[int, float, ndarray]:
    p = rows("probabilities", probabilities)
    if (p < 0).any() or (abs(p.sum(1) - 1) > 1e-3).any():
        raise ValueError("probabilities must be non-negative rows that sum to 1 within 1e-3")
    return len(p), xlogy(p, p).sum(), p.sum(0)


def _score(parts: list[tuple[int, float, ndarray]]) -> float:
    n, negentropy, total = map(sum, zip(*parts))
    return float(np.exp(negentropy / n - xlogy(total / n, total / n).sum()))


# Monge Inception distance (arXiv:2605.06797): how far the sorted projections of two sets lie apart, over many random directions.
TOGETHER = 100  # directions whose projections are held at a time


def mind(
    samples: ndarray,
    reference: ndarray,
    directions: int = 10_000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> float:
    """3 d times the mean over unit directions u of the squared 2-Wasserstein distance of samples (n, d).u and reference (m, d).u.

    The larger set is first thinned to as many rows as the other; that and the directions are drawn as torch-fidelity draws
    them. Two sets of one distribution are about d / n apart, so values compare only at the same number of rows.
    """
    x, y = rows("samples", samples), rows("reference", reference)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}")
    n, dim = min(len(x), len(y)), x.shape[1]
    if n < 1 or directions < 1:
        raise ValueError(
            f"need rows and directions, got {len(x)} and {len(y)} rows and {directions} directions"
        )
    draw = torch.Generator().manual_seed(seed)
    x, y = (
        side[torch.randperm(len(side), generator=draw)[:n].numpy()] if len(side) > n else side
        for side in (x, y)
    )
    along = torch.randn(directions, dim, generator=draw)
    along /= along.norm(dim=1, keepdim=True)
    a, b = (torch.from_numpy(side).to(device, torch.float32) for side in (x, y))
    gaps = [
        ((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean(0)
        for u in along.to(device).T.split(TOGETHER, 1)
    ]
    return float(3 * dim * np.mean(torch.cat(gaps).double().cpu().numpy()))
