"""The spread of scores over training seeds, and which differences it explains. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

LOG_SCALED = {
    "fd_digits",
    "fd_cifar_classifier",
    "fid",
}  # their spread over seeds grows with their value
LEVEL = 0.05
OUTLIERS = 0.5  # sampling error of a Fréchet distance over its value, from which a few images make most of it


def scaled(name: str, values: list[dict[str, float]]) -> list[float]:
    return [
        math.log(max(value[name], 1e-9)) if name in LOG_SCALED else value[name] for value in values
    ]


def pooled(name: str, rows: Sequence[list[dict[str, float]]]) -> tuple[float, int] | None:
    """Standard deviation over training seeds, pooled over rows, and its degrees of freedom; None without repeats."""
    groups = [scaled(name, values) for values in rows if len(values) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    return math.sqrt(
        sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom
    ), freedom


def reach(spread: tuple[float, int], num_a: int, num_b: int, comparisons: int) -> float:
    """Largest difference of two means that noise explains at LEVEL over all comparisons (Student, two-sided)."""
    from scipy.special import stdtrit

    deviation, freedom = spread
    return (
        float(stdtrit(freedom, 1 - LEVEL / 2 / max(comparisons, 1)))
        * deviation
        * math.sqrt(1 / num_a + 1 / num_b)
    )


def agree(
    name: str,
    a: list[dict[str, float]],
    b: list[dict[str, float]],
    spread: tuple[float, int] | None,
    comparisons: int,
) -> bool:
    if spread is None:
        return True
    difference = abs(statistics.fmean(scaled(name, a)) - statistics.fmean(scaled(name, b)))
    return difference <= reach(spread, len(a), len(b), comparisons)


def made_by_few(name: str, rows: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """A sentence on the rows of which a few images make a Fréchet distance: its error is then as large as what they add."""
    shares = {
        label: max(
            (
                value[f"{name}_se"] / value[name]
                for value in values
                if value.get(f"{name}_se") and value[name] > 0
            ),
            default=0.0,
        )
        for label, values in rows.items()
    }
    few = [
        f"{label}, sampling error {share:.0%} of {name}"
        for label, share in shares.items()
        if share > OUTLIERS
    ]
    return [
        f"{'; '.join(few)}: a few images far from all others make most of this distance, as where sampling diverged; the other scores do not grow with it."
    ] * bool(few)
