"""Distances between sets of features, each with its sampling error. All arithmetic is float64; nothing here knows a network.

Shapes: n samples, m reference points, d feature width, C classes.  u = 2^-53 is the unit round-off.
Fréchet distance: Heusel et al. 2017, eq. 6.  Inception score: Salimans et al. 2016, split as in Dhariwal & Nichol 2021 (ADM).
Precision and recall: Kynkäänniemi et al. 2019, eq. 1-2.  Delete-a-group jackknife: Busing, Meijer & van der Leeden 1999.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from math import nan, sqrt
from operator import add

import numpy as np
from numpy import ndarray
from scipy.special import xlogy


class Moments:
    """Count `n`, `mean` (d,) and `scatter` (d, d) = sum (x - mean)(x - mean)^T of the rows seen so far.

    Batches and sets are merged about their own means (Chan, Golub & LeVeque 1979), so no large sums cancel. Published
    statistics become a reference by assigning the three: scatter = covariance * (n - 1).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @property
    def cov(self) -> ndarray:
        """Covariance (d, d), divided by n - 1. ValueError below two samples."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: ndarray) -> None:
        """Add rows (b, d) of any real type; ValueError unless finite."""
        x = _rows("features", features)
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
            self.scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n)
            self.mean = self.mean + gap * (other.n / n)
            self.n = n


def frechet(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2), the root by eigenvalues clipped at 0.

    Symmetric up to rounding, and may end a rounding error below 0. ValueError: under 2 samples, other width, not finite.
    """
    (mean1, cov1), (mean2, cov2) = _statistics(a, b)
    root = _root(cov1)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_se(features: ndarray, sample: Moments, reference: Moments, labels: ndarray | None = None) -> float:
    """Standard error of `frechet(sample, reference)` over redraws of the samples, the reference held fixed: sd(psi) / sqrt(n).

    psi_i = 2 (mu - mu_r).(x_i - mu) + (x_i - mu)^T (I - T)(x_i - mu) - constant is the influence of sample i, and
    T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2) the optimal map from S to S_r. First order: it vanishes with the
    distance itself. features (n, d) are the rows `sample` was made of. labels (n,) say that each class's count was fixed
    in advance, as in class-balanced sets: the sd is then pooled within classes. nan (not available) below n = 4 d.
    """
    (mean, cov), (mean_r, cov_r) = _statistics(sample, reference)
    n, dim = sample.n, mean.size
    if np.shape(features) != (n, dim):
        raise ValueError(f"features have shape {np.shape(features)}, the sample statistics say {(n, dim)}")
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels have shape {np.shape(labels)}, expected {(n,)}")
    if n < 4 * dim:
        return nan
    root = _root(cov_r)
    values, vectors = np.linalg.eigh(root @ cov @ root)
    kept = values > dim * np.finfo(float).eps * values.max()  # the others lie outside the reference's span, where T is 0
    half = root @ vectors[:, kept] / values[kept] ** 0.25  # T = half half^T
    psi = np.empty(n)
    for i in range(0, n, 4096):
        x = np.asarray(features[i : i + 4096], float) - mean
        psi[i : i + 4096] = 2 * x @ (mean - mean_r) + np.square(x).sum(1) - np.square(x @ half).sum(1)
    _, group = np.unique(np.zeros(n) if labels is None else labels, return_inverse=True)
    counts = np.bincount(group)
    if len(counts) == n:
        raise ValueError("every sample has its own label: no spread within classes to measure")
    psi -= (np.bincount(group, psi) / counts)[group]
    return sqrt(np.square(psi).sum() / (n - len(counts)) / n)


def frechet_jackknife(blocks: Sequence[Moments], reference: Moments) -> tuple[float, float]:
    """Fréchet distance of the blocks' union with its O(1/n) bias removed, and the standard error, by deleting one block at a time.

    Blocks must be exchangeable (random rows, not one class each); they may differ in size.
    """
    if len(blocks) < 2 or any(block.n < 1 for block in blocks):
        raise ValueError(f"the jackknife needs at least 2 blocks with samples, got counts {[block.n for block in blocks]}")
    deleted = [frechet(reduce(add, [*blocks[:j], *blocks[j + 1 :]]), reference) for j in range(len(blocks))]
    return _jackknife(frechet(reduce(add, blocks), reference), deleted, [block.n for block in blocks])


def inception_score(probabilities: ndarray, block: int = 5000) -> tuple[float, float]:
    """ADM's score: mean over consecutive blocks of rows of exp(mean_i KL(p_i || mean p)); a short last block weighs the same.

    probabilities (n, C) are in file order: a file sorted by class scores far too low. The second value is the standard error
    of the score of the whole set as one block, by deleting one of ten consecutive blocks at a time; nan below ten rows.
    """
    n = len(probabilities)
    if n < 1 or block < 1:
        raise ValueError(f"need at least one row and a positive block, got {n} rows and block {block}")
    value = float(np.mean([_score([_sums(probabilities[i : i + block])]) for i in range(0, n, block)]))
    if n < 10:
        return value, nan
    tenths = [_sums(part) for part in np.array_split(probabilities, 10)]
    deleted = [_score(tenths[:j] + tenths[j + 1 :]) for j in range(10)]
    return value, _jackknife(_score(tenths), deleted, [tenth[0] for tenth in tenths])[1]


def precision_recall(reference: ndarray, samples: ndarray, k: int = 3, block: int = 2000) -> tuple[float, float]:
    """Share of samples (n, d) inside any reference ball, and share of reference points (m, d) inside any sample ball.

    A ball is closed and reaches its centre's k-th nearest other row of the same set; a duplicate row counts as another row.
    The result does not depend on `block`, which bounds memory at a few block x block and block x d arrays.
    """
    real, fake = _rows("reference", reference), _rows("samples", samples)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {fake.shape[1]}")
    if block < 1 or not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"need block >= 1 and 1 <= k < rows, got block {block}, k {k}, rows {len(real)} and {len(fake)}")
    reach_real, reach_fake = _radii(real, k, block), _radii(fake, k, block)
    hit_real, hit_fake = np.zeros(len(real), bool), np.zeros(len(fake), bool)
    for rows, cols, near, slack in _distances(real, fake, block):
        outer, inner = reach_real[rows, None], reach_fake[cols]
        _refine(near, (abs(near - outer) <= slack) | (abs(near - inner) <= slack), real[rows], fake[cols])
        hit_fake[cols] |= (near <= outer).any(0)
        hit_real[rows] |= (near <= inner).any(1)
    return float(hit_fake.mean()), float(hit_real.mean())


def proportion_se(share: float, n: int) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of a share of n independent trials."""
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"need n >= 1 and a share in [0, 1], got n {n} and share {share}")
    return sqrt(share * (1 - share) / n)


def _rows(name: str, x: ndarray) -> ndarray:
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


def _jackknife(whole: float, deleted: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    ratio = sum(sizes) / np.array(sizes)
    pseudo = ratio * whole - (ratio - 1) * np.array(deleted)
    value = float((pseudo / ratio).sum())
    return value, sqrt((np.square(pseudo - value) / (ratio - 1)).mean())


def _sums(probabilities: ndarray) -> tuple[int, float, ndarray]:
    p = _rows("probabilities", probabilities)
    if (p < 0).any() or (abs(p.sum(1) - 1) > 1e-3).any():
        raise ValueError("probabilities must be non-negative rows that sum to 1 within 1e-3")
    return len(p), xlogy(p, p).sum(), p.sum(0)


def _score(parts: list[tuple[int, float, ndarray]]) -> float:
    n, negentropy, total = map(sum, zip(*parts))
    return float(np.exp(negentropy / n - xlogy(total / n, total / n).sum()))


def _distances(a: ndarray, b: ndarray, block: int) -> Iterator[tuple[slice, slice, ndarray, float]]:
    """Blocks |a|^2 + |b|^2 - 2 a.b of squared distances, and a bound on their difference from `_refine`'s.

    Each way is within 2 (d + 4) u (|a|^2 + |b|^2) of the truth in any order of summation; the bound has twice the room.
    """
    for i in range(0, len(a), block):
        rows = slice(i, i + block)
        for j in range(0, len(b), block):
            cols = slice(j, j + block)
            aa, bb = np.square(a[rows]).sum(1, keepdims=True), np.square(b[cols]).sum(1)
            slack = 4 * (a.shape[1] + 4) * np.finfo(float).eps * (aa.max() + bb.max())
            yield rows, cols, aa + bb - 2 * a[rows] @ b[cols].T, slack


def _refine(near: ndarray, mask: ndarray, a: ndarray, b: ndarray) -> None:
    """Replace the masked entries by sum (a - b)^2, the value that decides: it depends on the two rows only, not on the block."""
    rows, cols = mask.nonzero()
    for i in range(0, len(rows), 4096):
        r, c = rows[i : i + 4096], cols[i : i + 4096]
        near[r, c] = np.square(a[r] - b[c]).sum(1)


def _radii(x: ndarray, k: int, block: int) -> ndarray:
    """Squared distance from each row to its k-th nearest other row: (n,)."""
    nearest = np.full((len(x), k), np.inf)
    for rows, cols, near, slack in _distances(x, x, block):
        if rows == cols:
            np.fill_diagonal(near, np.inf)
        limit = nearest[rows, -1]
        if near.shape[1] >= k:
            limit = np.minimum(limit, np.partition(near, k - 1)[:, k - 1] + slack)
        candidates = near <= (limit + slack)[:, None]
        _refine(near, candidates & np.isfinite(near), x[rows], x[cols])
        near[~candidates] = np.inf
        nearest[rows] = np.partition(np.hstack([nearest[rows], near]), k - 1)[:, :k]
    return nearest[:, -1]
