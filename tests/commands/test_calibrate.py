"""`calibrate.py` holds the arithmetic to synthetic sets, and a published pair to its scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import calibrate
from experiments.engine.scoring import frechet
from experiments.engine.specs.spec import Evaluate
from tests.support.score_scripts import IMAGES, Script, use_grey_extractor


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(calibrate, capsys, monkeypatch)


def test_the_arithmetic_is_calibrated_on_synthetic_sets(
    script: Script, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibrate, "NETWORKS", {})
    status, out, _ = script.run("--device", "cpu")
    assert status == 0
    assert out.count("ok ") == 9
    assert "FAIL" not in out
    assert "was not checked" in out


@pytest.mark.slow
def test_a_wrong_arithmetic_fails_calibration(script: Script, monkeypatch: pytest.MonkeyPatch):
    right = frechet.frechet
    monkeypatch.setattr(calibrate, "NETWORKS", {})
    monkeypatch.setattr(frechet, "frechet", lambda a, b: 1.001 * right(a, b))
    status, out, _ = script.run("--device", "cpu")
    assert status == 1
    assert "FAIL" in out


@pytest.mark.slow
def test_samples_of_committed_networks_meet_the_committed_scores():
    checks = list(calibrate._check_networks("cpu"))
    assert len(checks) == 5 * len(calibrate.NETWORKS)
    assert all(check.passes for check in checks), checks


@pytest.mark.slow
def test_another_sampler_fails_calibration(monkeypatch: pytest.MonkeyPatch):
    name, stage = next(iter(calibrate.NETWORKS.items()))
    network = calibrate._of_file

    def with_few_steps(stage: Evaluate, path: Path) -> Evaluate:
        made = network(stage, path)
        return replace(made, sampler=replace(made.sampler, num_steps=5))

    monkeypatch.setattr(calibrate, "NETWORKS", {name: stage})
    monkeypatch.setattr(calibrate, "_of_file", with_few_steps)
    assert not all(check.passes for check in calibrate._check_networks("cpu"))


def test_weights_that_are_missing_are_one_line(monkeypatch: pytest.MonkeyPatch):
    stage = next(iter(calibrate.NETWORKS.values()))
    monkeypatch.setattr(calibrate, "NETWORKS", {"digits_other.safetensors": stage})
    with pytest.raises(ValueError, match="digits_other.safetensors .* restore results with git"):
        list(calibrate._check_networks("cpu"))


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
