"""`evaluate.py` scores files of images and of statistics, compares pairs, and keeps records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import diff_protocol, evaluate
from experiments.engine.data.image_files import file_sha256, write_images
from experiments.engine.records.store import Record, read_record
from experiments.engine.scoring import measure, outcome, reference
from tests.support.score_scripts import (
    IMAGES,
    NARROW_LAYERS,
    Script,
    use_grey_extractor,
    write_samples,
)


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    """`evaluate.py` with a small extractor in place of Inception."""
    use_grey_extractor(monkeypatch)
    return Script(evaluate, capsys, monkeypatch)


# ---- Files of images


@pytest.mark.parametrize(
    "expected",
    [
        "FID-50 ",
        "sFID-50 ",
        "IS-50 ",
        "precision-50 ",
        "ADM's half precision",
        "50 reference rows",
        "KID-50 ",
        "real.npz holds no statistics",
        "carries mu, sigma, which was ignored",
    ],
)
def test_any_two_files_are_scored(expected: str, script: Script, tmp_path: Path):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[:50])
    np.savez(tmp_path / "fake.npz", arr_0=IMAGES[30:], mu=np.zeros(2048), sigma=np.eye(2))
    status, out, _ = script.run(tmp_path / "fake.npz", "--against", tmp_path / "real.npz", "--half")
    assert status == 0
    assert expected in out


# ---- Pairs


def test_common_seeds_are_paired_by_their_index(script: Script, tmp_path: Path):
    """The files hold the images in other orders, and every image has its own brighter copy."""
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    brighter = np.minimum(IMAGES, 250) + np.uint8(5)
    a = write_samples(tmp_path / "a.npz", IMAGES)
    b = write_samples(tmp_path / "b.npz", brighter, order=1)

    status, out, _ = script.run(a, b, "--against", tmp_path / "real.npz", "--paired")
    assert status == 0
    assert "a.npz less b.npz: FID-80 " in out
    assert "paired; ±" in out
    assert "resolved" in out.splitlines()[-1]


@pytest.mark.parametrize("seed, num", [(1, 80), (0, 70)], ids=["seed", "number"])
def test_files_of_different_seeds_are_not_paired(
    seed: int, num: int, script: Script, tmp_path: Path
):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    a = write_samples(tmp_path / "a.npz", IMAGES)
    other = write_samples(tmp_path / "other.npz", IMAGES[:num], seed=seed)
    error = script.refuse(a, other, "--against", tmp_path / "real.npz", "--paired")
    assert "different seeds" in error


# ---- Records


def score_and_record(script: Script, folder: Path, name: str, seed: int) -> Record:
    """Score a sample file of a seed, and return the record of it."""
    path = write_samples(folder / f"{name}.npz", IMAGES, seed)
    against = folder / "real.npz"
    record = folder / f"{name}.json"
    status, out, _ = script.run(path, "--against", against, "--record", record)
    assert status == 0
    assert "network evaluations per image: 7\n" in out
    return read_record(record)


def test_scores_are_recorded_with_all_that_decided_them(script: Script, tmp_path: Path):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    values = score_and_record(script, tmp_path, "a", seed=0).values

    # The scores: these images are the reference's, so no distance is left.
    assert values["num"] == 80
    assert values["made"]["seed"] == 0
    assert abs(values["fid"]) < 1e-9
    assert any("holds no statistics" in text for text in values["warnings"])

    # What was scored.
    assert values["manifest"]["model"]["samples"] == {
        "name": "a.npz",
        "sha256": file_sha256(tmp_path / "a.npz"),
    }

    # How it was sampled.
    measure = values["manifest"]["measure"]
    assert measure["num"] == 80
    assert measure["nfe"] == 7
    assert measure["sampler"] == {"name": "ddim"}
    assert measure["guidance"]["scale"] == 1.5
    assert measure["labels"] == {
        "policy": "random",
        "histogram_sha256": outcome.label_histogram(np.arange(80) % 8),
    }

    # How it was scored.
    assert measure["reference"]["sha256"] == file_sha256(tmp_path / "real.npz")
    assert measure["flags"]["matmul_tf32"] is False
    assert measure["versions"]["torch"] == torch.__version__


def test_two_recorded_scores_are_told_apart_by_what_differs(
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    score_and_record(script, tmp_path, "a", seed=0)
    score_and_record(script, tmp_path, "b", seed=1)
    differ = Script(diff_protocol, capsys, monkeypatch)
    status, out, _ = differ.run(tmp_path / "a.json", tmp_path / "b.json")
    assert status == 1
    assert "measure.seed: 0 | 1\n" in out
    assert "differ in 1 fields" in out


def test_a_record_is_of_one_file(script: Script, tmp_path: Path):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    a = write_samples(tmp_path / "a.npz", IMAGES, seed=0)
    b = write_samples(tmp_path / "b.npz", IMAGES, seed=1)
    record = tmp_path / "c.json"
    error = script.refuse(a, b, "--against", tmp_path / "real.npz", "--record", record)
    assert "of one sample file, got 2" in error
    assert not record.exists()


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("a.npz", "no record of this suite"),
        ("notes.json", "no record of this suite"),
        ("folder", "is no plain file"),
        ("notes.json/b.json", "cannot write into"),
        ("/proc/b.json", "cannot write into"),
    ],
)
def test_a_record_that_cannot_be_written_is_refused_before_any_work(
    target: str, complaint: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is measured, and what is there stays."""
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("something is measured"))
    write_samples(tmp_path / "a.npz", IMAGES)
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "folder").mkdir()

    # Targets are files of somebody else, or the images themselves.
    before = (tmp_path / "a.npz").read_bytes()
    scored = (tmp_path / "a.npz", "--against", tmp_path / "real.npz")
    error = script.refuse(*scored, "--record", tmp_path / target)
    assert complaint in error
    assert error.endswith("name another --record\n")
    assert (tmp_path / "a.npz").read_bytes() == before


# ---- Files without images, and unfit files


def test_statistics_are_scored_as_far_as_they_go(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """FID of two normal distributions at a distance of 2 in each of 6 dimensions is 24."""
    monkeypatch.setattr(reference, "LAYERS", NARROW_LAYERS)
    np.savez(tmp_path / "a.npz", mu=np.full(6, 0.0), sigma=np.eye(6))
    np.savez(tmp_path / "b.npz", mu=np.full(6, 2.0), sigma=np.eye(6))
    status, out, _ = script.run(tmp_path / "a.npz", "--against", tmp_path / "b.npz")
    assert status == 0
    assert "N and errors are unknown" in out
    assert "fid             24.0000" in out
    assert "is" not in out.split("unknown")[1]


def write_unfit_files(folder: Path) -> None:
    """Write files that cannot be scored, and `real.npz`, which can."""
    np.savez(folder / "real.npz", arr_0=IMAGES)
    np.savez(folder / "one.npz", arr_0=IMAGES[:1])
    np.savez(folder / "floats.npz", arr_0=IMAGES / 255)
    np.savez(folder / "nothing.npz", arr_1=np.arange(3))

    # Images from -1 to 1 that were cast before they were scaled.
    levels = np.linspace(-1, 1, 960).reshape(20, 4, 4, 3)
    np.savez(folder / "unscaled.npz", arr_0=levels.astype(np.int8).astype(np.uint8))

    # Samples that do not say from which seeds they are.
    labels = np.zeros(80, int)
    about = {"labels": "random"}
    path = folder / "seedless.npz"
    write_images(path, iter([IMAGES]), IMAGES.shape, labels, np.arange(80), about)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nothing.npz"], "no images (arr_0) and no statistics"),
        (["missing.npz"], "no such file"),
        (["real.npz", "--paired"], "compares two sample files"),
        (["real.npz", "real.npz", "--paired"], "does not say from which seeds"),
        (["floats.npz"], "float64"),
        (["unscaled.npz"], "unscaled.npz: 0, 1, 255 are all the levels that the images have"),
        (["one.npz"], "one.npz: a covariance needs at least 2 samples"),
        (
            ["seedless.npz", "seedless.npz", "--paired"],
            "seedless.npz does not say from which seeds",
        ),
    ],
)
def test_bad_files_are_one_line(
    arguments: list[str],
    complaint: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    write_unfit_files(tmp_path)
    assert complaint in script.refuse(*arguments, "--against", "real.npz")


def test_missing_weights_of_inception_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Without the stand-in: the weights are looked for before anything is scored."""
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", arr_0=IMAGES)
    arguments = ("real.npz", "--inception", "no.pth", "--against", "real.npz")
    error = Script(evaluate, capsys, monkeypatch).refuse(*arguments)
    assert "no such Inception weights" in error
