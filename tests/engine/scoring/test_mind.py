"""MIND against a closed form, another implementation's values and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray

from experiments.engine.scoring.metrics import mind


def drawn(n: int, seed: int, shift: float) -> ndarray:
    return (
        np.abs(np.random.default_rng(seed).standard_normal((n, 37))) * np.linspace(0.2, 2, 37)
        + shift
    )


# computed by torch-fidelity's `mind_features_to_metric` (0.5.0-dev) on these rows in float64, 200 directions, seed 2020
@pytest.mark.parametrize(
    "n, m, theirs",
    [(300, 300, 1.5907465741038322), (500, 217, 2.4297649282962084), (217, 500, 1.918106596916914)],
)
def test_rows_and_directions_are_drawn_as_torch_fidelity_draws_them(n: int, m: int, theirs: float):
    assert mind(
        samples=drawn(n, 0, 0.0), reference=drawn(m, 1, 0.05), directions=200
    ) == pytest.approx(theirs, rel=1e-4)


def test_a_set_moved_as_a_whole_is_three_times_the_square_of_the_way():
    x, way = drawn(150, 2, 0.0), np.linspace(-1, 2, 37)
    assert mind(samples=x, reference=x) == 0 and mind(
        samples=x, reference=x + way
    ) == pytest.approx(3 * way @ way, rel=0.03)
    assert mind(
        samples=x, reference=np.random.default_rng(0).permutation(x) + way
    ) == pytest.approx(mind(samples=x, reference=x + way), rel=1e-5)


def test_gaussians_of_two_widths_are_as_far_apart_as_their_deviations():
    x, y = np.random.default_rng(3).standard_normal((2, 4000, 16))
    assert mind(samples=x, reference=1.5 * y, directions=500) == pytest.approx(
        3 * 16 * 0.5**2, rel=0.05
    )


@pytest.mark.parametrize(
    "x, y, directions",
    [
        (np.ones((4, 3)), np.ones((4, 2)), 5),
        (np.ones((4, 3)), np.ones((0, 3)), 5),
        (np.ones((4, 3)), np.ones((4, 3)), 0),
        (np.full((4, 3), np.nan), np.ones((4, 3)), 5),
    ],
)
def test_bad_input_raises(x: ndarray, y: ndarray, directions: int):
    with pytest.raises(ValueError):
        mind(samples=x, reference=y, directions=directions)
