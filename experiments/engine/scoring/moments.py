"""Count, mean and scatter of feature rows, accumulated in float64 and merged without cancellation.

Shapes: N rows, d feature width. Nothing here knows a network.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy import ndarray

NUM_BLOCKS = 10  # blocks of rows, each left out once by the delete-a-block jackknife
UNKNOWN_COUNT = 2**30 + 1  # stands for the count of published statistics, which files do not hold


def as_rows(name: str, x: Any) -> ndarray:
    """Return the array in float64.

    Args:
        name: what the array is called in an error.
        x: rows (N, d) of any real type.

    Raises:
        ValueError: unless the array is (N, d) and finite.
    """
    x = np.asarray(x, float)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"{name} must be rows (n, d) of finite numbers, got shape {x.shape}")
    return x


class Moments:
    """Statistics of the rows seen so far, from which mean and covariance follow.

    Batches and sets are merged about their own means (Chan, Golub & LeVeque 1979), so that no large
    sums cancel.

    Attributes:
        n: number of rows.
        mean: mean row, (d,).
        scatter: sum of (x - mean)(x - mean)^T over the rows, (d, d).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @classmethod
    def known(cls, mean: ndarray, cov: ndarray) -> Moments:
        """Moments of unknown count, set to 2^30 + 1 so that `cov` is returned unchanged."""
        moments = cls(len(mean))
        moments.n = UNKNOWN_COUNT
        moments.mean = mean
        moments.scatter = cov * float(UNKNOWN_COUNT - 1)  # a power of two: dividing is exact
        return moments

    @property
    def cov(self) -> ndarray:
        """Covariance (d, d), divided by n - 1.

        Raises:
            ValueError: below two rows.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: ndarray) -> None:
        """Add rows (b, d) of any real type.

        Raises:
            ValueError: if the rows are not finite or have another width.
        """
        x = as_rows("features", features)
        batch = Moments(x.shape[1])
        if len(x):
            batch.n = len(x)
            batch.mean = x.mean(0)
            x = x - batch.mean
            batch.scatter = x.T @ x
        self._absorb(batch)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.mean.size)
        total._absorb(self)
        total._absorb(other)
        return total

    def _absorb(self, other: Moments) -> None:
        if self.mean.size != other.mean.size:
            raise ValueError(f"feature widths differ: {self.mean.size} and {other.mean.size}")
        if other.n == 0:
            return

        # The scatter about the common mean gains a term for the gap between the two means.
        n = self.n + other.n
        gap = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n)
        self.mean = self.mean + gap * (other.n / n)
        self.n = n


def split_into_blocks(features: ndarray, labels: ndarray | None = None) -> list[Moments]:
    """Return the moments of ten blocks of rows that are dealt at random, fewer below ten rows.

    Args:
        features: rows (N, d).
        labels: (N,); with them every class is spread evenly over the blocks.
    """
    # Deal the rows in turn, from an order that is random within each class.
    n = len(features)
    shuffled = np.random.default_rng(0).permutation(n)
    classes = np.zeros(n) if labels is None else labels
    order = np.lexsort((shuffled, classes))

    # A block keeps the order of the file, so that its sums do not depend on the shuffle.
    blocks = []
    for j in range(min(NUM_BLOCKS, n)):
        block = Moments(features.shape[1])
        block.update(features[np.sort(order[j::NUM_BLOCKS])])
        blocks.append(block)
    return blocks


def moments_of(features: ndarray) -> Moments:
    """Return the moments of all rows, accumulated block by block."""
    return reduce(add, split_into_blocks(features))
