"""Rows of a table compared within training seeds: which differences are more than noise.

The replicate is the training seed. Rows that were trained from one seed share their draws, so a
seed moves all rows together. The model of the logarithm of a score is row + seed + residual, with
one variance of the residual for all rows. Intervals of all pairs hold together, by Tukey's
studentised range.

Source: Tukey's method for a randomised complete block design (Montgomery, "Design and Analysis of
Experiments", section 4.1). scipy is imported where it is used.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """How much row `b` is above row `a`, in percent of the score."""

    a: str
    b: str
    percent: float
    # ends of the simultaneous interval
    low: float
    high: float

    @property
    def is_resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Assumptions:
    """Checks of the model; a small probability speaks against the assumption."""

    # probability of residuals as far from normal as these (Shapiro and Wilk)
    normal: float
    # probability of variances that differ between rows as much as these (Levene, about medians);
    # not a number with two seeds
    equal_variances: float
    # probability of an interaction of row and seed as large as this (Tukey's one degree of freedom)
    additive: float


@dataclass(frozen=True)
class PairedComparison:
    """The two-way model of a table's scores, fitted."""

    # geometric mean of a row's score over the seeds, by row
    means: dict[str, float]
    num_seeds: int
    # standard deviation of the residual of the log score
    residual: float
    degrees_of_freedom: int
    differences: tuple[Difference, ...]
    assumptions: Assumptions

    @property
    def half_width(self) -> float:
        """Half of a simultaneous interval, in percent of the score."""
        width = _half_width(self.residual, len(self.means), self.num_seeds)
        return 100 * math.expm1(width)

    def seeds_needed(self, difference: Difference) -> int | None:
        """Return the fewest seeds at which the interval of a difference would exclude zero.

        Returns None if even MOST_SEEDS would not do.
        """
        num_rows = len(self.means)
        gap = abs(math.log1p(difference.percent / 100))
        if _half_width(self.residual, num_rows, MOST_SEEDS) >= gap:
            return None

        # the quantile falls with more seeds, so the limit of many seeds is where the search begins
        limit = _quantile(num_rows, 100_000) * self.residual / gap
        seeds = max(2, math.ceil(limit**2))
        while _confidence(gap / self.residual, num_rows, seeds) <= LEVEL:
            seeds += 1
        return seeds


def compare_paired(scores: Mapping[str, Mapping[int, float]]) -> PairedComparison:
    """Fit the two-way model to scores by row and seed, and compare all pairs of rows.

    Raises ValueError if there are fewer than two rows or seeds, if a row lacks another row's seed,
    or if a score is not positive.
    """
    rows, seeds = list(scores), _common_seeds(scores)
    logs = {row: [math.log(scores[row][seed]) for seed in seeds] for row in rows}

    # means of rows and seeds leave the residual, with (rows - 1) (seeds - 1) degrees of freedom
    grand = statistics.fmean(itertools.chain.from_iterable(logs.values()))
    row_means = {row: statistics.fmean(logs[row]) for row in rows}
    seed_means = [statistics.fmean(logs[row][at] for row in rows) for at in range(len(seeds))]
    residuals = {
        row: [
            value - row_means[row] - seed_mean + grand
            for value, seed_mean in zip(logs[row], seed_means, strict=True)
        ]
        for row in rows
    }
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    squares = sum(value**2 for values in residuals.values() for value in values)
    residual = math.sqrt(squares / freedom)

    # every pair has the same width in logarithms
    width = _half_width(residual, len(rows), len(seeds))
    differences = tuple(
        _difference(a, b, row_means[b] - row_means[a], width)
        for a, b in itertools.combinations(rows, 2)
    )
    return PairedComparison(
        means={row: math.exp(mean) for row, mean in row_means.items()},
        num_seeds=len(seeds),
        residual=residual,
        degrees_of_freedom=freedom,
        differences=differences,
        assumptions=_check_assumptions(logs, residuals, row_means, seed_means, grand),
    )


@dataclass(frozen=True)
class RankAgreement:
    """Kendall's tau of two orders of rows, and its 95 % interval."""

    tau: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.tau:.2f} ({LEVEL:.0%}: {self.low:.2f} to {self.high:.2f})"


def rank_agreement(
    values: Mapping[str, float],
    errors: Mapping[str, float],
    published: Mapping[str, float],
    draws: int = 2000,
) -> RankAgreement:
    """Return how well our order of rows agrees with the published one.

    The interval is that of tau over normal draws of our values with their standard errors, from a
    fixed seed. Rows without a published value are left out.
    """
    import numpy as np
    from scipy.stats import kendalltau

    rows = [row for row in values if row in published]
    ours, theirs = (np.array([side[row] for row in rows]) for side in (values, published))
    scales = np.array([errors[row] for row in rows])
    noise = np.random.default_rng(0).normal(0.0, scales, (draws, len(rows)))

    # All draws at once; the method concerns the p-value alone, which is not used.
    drawn = np.vstack([ours, ours + noise])
    pairs = drawn, np.broadcast_to(theirs, drawn.shape)
    first, *simulated = kendalltau(*pairs, axis=1, method="asymptotic").statistic
    low, high = np.quantile(simulated, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return RankAgreement(float(first), float(low), float(high))


def _common_seeds(scores: Mapping[str, Mapping[int, float]]) -> list[int]:
    """Return the seeds of all rows, sorted; ValueError if the table is not complete."""
    all_seeds = sorted(set(itertools.chain.from_iterable(scores.values())))
    if len(scores) < 2 or len(all_seeds) < 2:
        raise ValueError("a paired comparison needs at least two rows and two seeds")
    for row, values in scores.items():
        if missing := sorted(set(all_seeds) - set(values)):
            seeds = ", ".join(map(str, missing))
            raise ValueError(
                f"row {row!r} lacks seed {seeds}; run it, or leave the seed out for all"
            )
        if bad := [seed for seed, value in values.items() if not value > 0]:
            raise ValueError(f"row {row!r}, seed {bad[0]}: a score must be positive")
    return all_seeds


@lru_cache
def _quantile(num_rows: int, freedom: int) -> float:
    """Return the quantile of the studentised range, which takes scipy a while."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(LEVEL, num_rows, freedom))


def _half_width(residual: float, num_rows: int, num_seeds: int) -> float:
    """Return half of a simultaneous interval of a difference of log scores."""
    freedom = (num_rows - 1) * (num_seeds - 1)
    return _quantile(num_rows, freedom) * residual / math.sqrt(num_seeds)


def _confidence(half_width: float, num_rows: int, num_seeds: int) -> float:
    """Return the level of intervals whose half is so many residuals wide."""
    from scipy.stats import studentized_range

    freedom = (num_rows - 1) * (num_seeds - 1)
    return float(studentized_range.cdf(half_width * math.sqrt(num_seeds), num_rows, freedom))


def _difference(a: str, b: str, log_ratio: float, width: float) -> Difference:
    """Return a difference with its interval, in percent."""
    return Difference(
        a=a,
        b=b,
        percent=100 * math.expm1(log_ratio),
        low=100 * math.expm1(log_ratio - width),
        high=100 * math.expm1(log_ratio + width),
    )


def _check_assumptions(
    logs: Mapping[str, Sequence[float]],
    residuals: Mapping[str, Sequence[float]],
    row_means: Mapping[str, float],
    seed_means: Sequence[float],
    grand: float,
) -> Assumptions:
    """Test residuals for normality, equal variances and additivity."""
    from scipy import stats

    everything = list(itertools.chain.from_iterable(residuals.values()))
    normal = float(stats.shapiro(everything).pvalue)
    equal = math.nan
    if len(seed_means) > 2:  # two residuals of a row differ from its median by the same amount
        equal = float(stats.levene(*residuals.values(), center="median").pvalue)

    # Tukey's test: the residual's part along the product of the effects of row and seed
    products = [
        (row_means[row] - grand) * (seed_mean - grand) for row in logs for seed_mean in seed_means
    ]
    observed = list(itertools.chain.from_iterable(logs.values()))
    along = sum(p * value for p, value in zip(products, observed, strict=True))
    square = along**2 / sum(p**2 for p in products)
    rest = sum(value**2 for value in everything) - square
    freedom = (len(row_means) - 1) * (len(seed_means) - 1) - 1
    additive = float(stats.f.sf(square / (rest / freedom), 1, freedom)) if freedom > 0 else math.nan
    return Assumptions(normal, equal, additive)
