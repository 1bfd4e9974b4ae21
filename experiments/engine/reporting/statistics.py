"""The spread of scores over training seeds, and which differences it explains. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.engine.records.score_names import SCORES

# Scores of one row, a dictionary per training seed.
Values = Sequence[dict[str, float]]

# The spread of these scores over seeds grows with their value.
LOG_SCALED = {key for key, score in SCORES.items() if score.log_scaled}

# The share of cases in which noise alone may look like a difference.
LEVEL = 0.05


@dataclass(frozen=True)
class Spread:
    """Standard deviation over training seeds, pooled over rows."""

    # of the value, or of its logarithm for the scores in LOG_SCALED
    deviation: float
    # degrees of freedom: the number of repeated runs
    freedom: int


def scale_scores(name: str, values: Values) -> list[float]:
    """A score of every seed on the scale on which its spread does not depend on its value."""
    if name in LOG_SCALED:
        return [math.log(max(value[name], 1e-9)) for value in values]
    return [value[name] for value in values]


def mean_score(name: str, values: Values) -> float:
    """The mean of `scale_scores` over the seeds."""
    return statistics.fmean(scale_scores(name, values))


def pool_spread(name: str, rows: Sequence[Values]) -> Spread | None:
    """The spread of a score, pooled over rows; None if no row has a second seed."""
    groups = [scale_scores(name, values) for values in rows if len(values) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None

    # every row's squared deviations from its own mean, over all degrees of freedom
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return Spread(math.sqrt(squares / freedom), freedom)


def noise_bound(spread: Spread, num_a: int, num_b: int, comparisons: int) -> float:
    """The largest difference of two means over seeds that noise explains.

    Two-sided by Student's distribution, at LEVEL for all comparisons together (Bonferroni).

    Args:
        spread: the spread over seeds.
        num_a: the number of seeds of one mean.
        num_b: the number of seeds of the other mean.
        comparisons: the number of differences that are looked at.
    """
    from scipy.special import stdtrit

    quantile = float(stdtrit(spread.freedom, 1 - LEVEL / 2 / max(comparisons, 1)))
    return quantile * spread.deviation * math.sqrt(1 / num_a + 1 / num_b)


def agree(name: str, a: Values, b: Values, spread: Spread | None, comparisons: int) -> bool:
    """Whether noise explains the difference of two rows' means; true if the spread is unknown."""
    if spread is None:
        return True
    difference = abs(mean_score(name, a) - mean_score(name, b))
    return difference <= noise_bound(spread, len(a), len(b), comparisons)
