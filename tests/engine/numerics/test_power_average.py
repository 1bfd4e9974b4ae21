"""Power-function averages against the authors' values, float64, and against plain integrals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments.engine.numerics.power_average import (
    Stored,
    decay_at,
    exponent_of,
    rebuild,
    width_of,
)
from experiments.engine.training.averages import update_average
from tests.support.paths import DATA

VALUES = json.loads((DATA / "outputs_own_work.json").read_text())["power_averages"]
OUTPUTS = VALUES["outputs"]
# The published approximation errors: by number of even snapshots of two widths, those of the
# profiles 0.03, 0.075, 0.15, 0.20 and 0.25.
ERRORS = {
    4: (0.17, 0.035, 0.106, 0.22, 0.39),
    8: (0.10, 0.0125, 0.033, 0.078, 0.18),
    16: (0.039, 3.5e-3, 9.0e-3, 0.023, 0.079),
}


def test_exponents_and_decays_are_the_authors():
    for width, exponent in zip(VALUES["stds"], OUTPUTS["phema_gamma"], strict=True):
        assert exponent_of(width) == pytest.approx(exponent, rel=1e-12)
        assert width_of(exponent_of(width)) == pytest.approx(width, rel=1e-12)
    decays = [decay_at(*step) for step in VALUES["beta"]]
    assert decays == pytest.approx(OUTPUTS["phema_beta"], rel=1e-12)
    assert decay_at(0.1, 8, 8) == 0


@pytest.mark.parametrize("number", range(len(VALUES["cases"])))
def test_coefficients_are_the_authors(number: int):
    case = VALUES["cases"][number]
    stored = [Stored(time, width) for time in case["t"] for width in case["stds"]]
    later = [Stored(2 * case["at"], width) for width in case["stds"]]
    expected = np.array(OUTPUTS[f"phema_coefficients_{number}"])
    for column, width in enumerate(case["wanted"]):
        rebuilt = rebuild([*stored, *later], case["at"], width)
        np.testing.assert_allclose(rebuilt.coefficients, expected[:, column], atol=1e-12)
        assert rebuilt.coefficients.sum() == pytest.approx(1)


def test_kept_and_rebuilt_averages_of_a_track_are_the_authors():
    """The weights that were there before the first step, 99, leave no trace."""
    track = VALUES["track"]
    draw = np.random.Generator(np.random.PCG64(track["seed"]))
    weights = torch.from_numpy(draw.standard_normal((track["steps"], 3)).cumsum(0))
    widths = (*track["stds"], *track["wanted"])
    averages = {width: torch.full((3,), 99.0, dtype=torch.float64) for width in widths}

    stored, values = [], []
    for step, weight in enumerate(weights, 1):
        for width, average in averages.items():
            time = step * track["batch"]
            update_average([average], [weight], decay_at(width, time, track["batch"]))
        if step in track["snapshots"]:
            stored += [Stored(step * track["batch"], width) for width in track["stds"]]
            values += [averages[width].numpy().copy() for width in track["stds"]]
    np.testing.assert_allclose(values, OUTPUTS["phema_tracked"], atol=1e-9)

    end = track["steps"] * track["batch"]
    for row, width in enumerate(track["wanted"]):
        by_fit = rebuild(stored, end, width).coefficients @ np.array(values)
        np.testing.assert_allclose(by_fit, OUTPUTS["phema_reconstructed"][row], atol=1e-9)
        np.testing.assert_allclose(averages[width], OUTPUTS["phema_direct"][row], atol=1e-9)


@pytest.mark.parametrize("num", ERRORS)
def test_the_error_of_a_profile_is_the_published_one_and_that_of_the_integral(num: int):
    stored = [Stored(time, width) for time in range(1, num + 1) for width in (0.05, 0.10)]
    s = (np.arange(200_000) + 0.5) / 200_000 * num

    def profile(time: float, width: float) -> np.ndarray:
        g = exponent_of(width)
        return np.where(s <= time, (g + 1) / time * (s / time) ** g, 0)

    for width, expected in zip((0.03, 0.075, 0.15, 0.20, 0.25), ERRORS[num], strict=True):
        error = rebuild(stored, num, width).error
        assert error == pytest.approx(expected, rel=0.03)
    rebuilt = rebuild(stored, num, 0.15)
    parts = zip(rebuilt.stored, rebuilt.coefficients, strict=True)
    difference = sum(x * profile(one.time, one.width) for one, x in parts) - profile(num, 0.15)
    by_integral = np.sqrt(np.square(difference).mean() / np.square(profile(num, 0.15)).mean())
    assert rebuilt.error == pytest.approx(by_integral, rel=1e-3)


def test_a_stored_average_is_rebuilt_as_itself():
    stored = [Stored(time, width) for time in range(1, 9) for width in (0.05, 0.10)]
    rebuilt = rebuild(stored, 8, 0.10)
    np.testing.assert_allclose(rebuilt.coefficients, np.eye(16)[15], atol=1e-9)


@pytest.mark.parametrize("width", [0, -0.1, 0.2887, 1, float("nan")])
def test_widths_that_no_average_has_are_refused(width: float):
    with pytest.raises(ValueError, match="above 0 and below 0.2887"):
        exponent_of(width)


def test_a_time_at_which_nothing_was_stored_is_refused():
    with pytest.raises(ValueError, match="no average was stored at 3; stored: 2, 4"):
        rebuild([Stored(2, 0.05), Stored(4, 0.05)], 3, 0.07)
