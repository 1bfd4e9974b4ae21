"""Paired comparisons against regression, simulation and known quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.engine.reporting.paired import RankAgreement, compare_paired, rank_agreement


def table(
    effects: list[float], seeds: int, noise: float, draw: int = 0
) -> dict[str, dict[int, float]]:
    """Scores of rows r0, r1, ... with log effects, a shift per seed and normal noise."""
    generator = np.random.default_rng(draw)
    shifts = generator.normal(0, 0.1, seeds)
    return {
        f"r{row}": {
            seed: math.exp(effect + shifts[seed] + generator.normal(0, noise))
            for seed in range(seeds)
        }
        for row, effect in enumerate(effects)
    }


def test_the_fit_is_that_of_least_squares():
    scores = table([0.0, 0.02, -0.01, 0.05], 5, 0.01)
    comparison = compare_paired(scores)

    # the same model by a regression on indicators of rows and seeds
    design, target = [], []
    for row in range(4):
        for seed in range(5):
            design.append(
                [float(row == r) for r in range(4)] + [float(seed == s) for s in range(5)]
            )
            target.append(math.log(scores[f"r{row}"][seed]))
    fitted, *_ = np.linalg.lstsq(np.array(design), np.array(target), rcond=None)
    left = np.array(target) - np.array(design) @ fitted

    assert comparison.degrees_of_freedom == 12
    assert comparison.residual == pytest.approx(math.sqrt((left**2).sum() / 12))
    for difference in comparison.differences:
        a, b = int(difference.a[1:]), int(difference.b[1:])
        assert difference.percent == pytest.approx(100 * math.expm1(fitted[b] - fitted[a]))


def test_two_rows_have_the_interval_of_the_paired_t_test():
    scores = table([0.0, 0.03], 6, 0.02)
    (difference,) = compare_paired(scores).differences
    gaps = [math.log(scores["r1"][seed] / scores["r0"][seed]) for seed in range(6)]
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert difference.low == pytest.approx(100 * math.expm1(interval.low), rel=1e-5)
    assert difference.high == pytest.approx(100 * math.expm1(interval.high), rel=1e-5)


def test_intervals_hold_together_in_nineteen_of_twenty_tables():
    missed = 0
    for draw in range(400):
        comparison = compare_paired(table([0.0] * 5, 4, 0.01, draw))
        missed += any(difference.is_resolved for difference in comparison.differences)
    # 20 expected; 5 and 40 are beyond three standard deviations
    assert 5 < missed < 40


def test_the_seeds_needed_are_the_fewest_that_resolve():
    comparison = compare_paired(table([0.0, 0.01, 0.3], 4, 0.02))
    for difference in comparison.differences:
        needed = comparison.seeds_needed(difference)
        assert needed is not None
        gap = abs(math.log1p(difference.percent / 100))

        def width(seeds: int) -> float:
            quantile = stats.studentized_range.ppf(0.95, 3, 2 * (seeds - 1))
            return quantile * comparison.residual / math.sqrt(seeds)

        assert width(needed) < gap
        assert needed == 2 or width(needed - 1) >= gap


def test_assumptions_that_fail_are_seen():
    good = compare_paired(table([0.0, 0.1, 0.2, 0.3, 0.4], 8, 0.01)).assumptions
    assert min(good.normal, good.equal_variances, good.additive) > 0.01

    scores = table([0.0, 0.1, 0.2, 0.3, 0.4], 8, 0.01)
    interacting = {
        row: {seed: value ** (1 + 0.3 * seed) for seed, value in values.items()}
        for row, values in scores.items()
    }
    assert compare_paired(interacting).assumptions.additive < 1e-3
    wild = table([0.0, 0.1, 0.2, 0.3], 8, 0.001)
    wild["r4"] = table([0.0], 8, 0.2, draw=5)["r0"]
    assert compare_paired(wild).assumptions.equal_variances < 0.01


def test_ranks_agree_as_surely_as_rows_differ():
    published = {"r0": 10.0, "r1": 20.0, "r2": 30.0, "absent": 5.0}
    values = {"r0": 0.0, "r1": 1.0, "r2": 2.0}
    sure = rank_agreement(values, dict.fromkeys(values, 0.001), published)
    assert sure == RankAgreement(1.0, 1.0, 1.0)
    assert str(sure) == "1.00 (95%: 1.00 to 1.00)"

    # rows that differ by less than noise can stand in almost any order
    published = {f"r{row}": float(row) for row in range(6)}
    values = {row: 0.1 * place for place, row in enumerate(published)}
    unsure = rank_agreement(values, dict.fromkeys(values, 1.0), published)
    assert unsure.tau == pytest.approx(1)
    assert unsure.low < 0 < unsure.high

    # only the rows that are uncertain move
    errors = dict.fromkeys(values, 1e-6) | {"r0": 10.0}
    one = rank_agreement(values, errors, published)
    assert one.low == pytest.approx(1 / 3)
    assert one.high == pytest.approx(1)


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"a": {0: 1.0, 1: 2.0}}, "at least two rows"),
        ({"a": {0: 1.0}, "b": {0: 1.0}}, "two seeds"),
        ({"a": {0: 1.0, 1: 1.0}, "b": {0: 1.0}}, "row 'b' lacks seed 1"),
        (
            {"a": {0: 1.0, 1: 0.0}, "b": {0: 1.0, 1: 1.0}},
            "row 'a', seed 1: a score must be positive",
        ),
        ({"a": {0: 1.0, 1: math.nan}, "b": {0: 1.0, 1: 1.0}}, "must be positive"),
    ],
)
def test_an_incomplete_table_is_refused(scores: dict[str, dict[int, float]], message: str):
    with pytest.raises(ValueError, match=message):
        compare_paired(scores)
