"""`calibrate.py` holds the arithmetic to synthetic sets, and a published pair to its scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import calibrate
from experiments.engine.scoring import frechet
from tests.support.score_scripts import IMAGES, Script, use_grey_extractor


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(calibrate, capsys, monkeypatch)


def test_the_arithmetic_is_calibrated_on_synthetic_sets(script: Script):
    status, out, _ = script.run("--device", "cpu")
    assert status == 0
    assert out.count("ok ") == 9
    assert "FAIL" not in out
    assert "was not checked" in out


@pytest.mark.slow
def test_a_wrong_arithmetic_fails_calibration(script: Script, monkeypatch: pytest.MonkeyPatch):
    right = frechet.frechet
    monkeypatch.setattr(frechet, "frechet", lambda a, b: 1.001 * right(a, b))
    status, out, _ = script.run("--device", "cpu")
    assert status == 1
    assert "FAIL" in out


def test_a_published_pair_is_held_to_its_scores(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_grey_extractor(monkeypatch)
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=IMAGES)
    status, out, _ = script.run("--pair", "imagenet256", path, path)
    assert status == 1
    assert out.count("FAIL") == 5
    assert "ADM's evaluator 3.94256" in out


def test_a_pair_without_published_scores_is_refused(script: Script, tmp_path: Path):
    path = tmp_path / "a.npz"
    assert "unknown pair" in script.refuse("--pair", "imagenet64", path, path)
