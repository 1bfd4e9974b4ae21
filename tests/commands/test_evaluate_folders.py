"""`evaluate.py` scores folders of pictures as it scores files, and writes references of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from PIL import Image

from experiments import evaluate
from experiments.engine.data.pictures import Crop
from experiments.engine.records.store import read_record
from experiments.engine.scoring import reference
from experiments.engine.scoring.files.references import CROPS
from tests.support.score_scripts import IMAGES, NARROW_LAYERS, Script, use_grey_extractor

DRAW = np.random.default_rng(3)
NUM = 150  # two whole batches of the extractor, and a part of one
SAMPLES = DRAW.integers(0, 256, (NUM, 5, 7, 3), dtype=np.uint8)
REAL = DRAW.integers(0, 256, (90, 5, 7, 3), dtype=np.uint8)
# What a record says of names, times and files, which scores do not depend on.
ABOUT = {"manifest", "made", "warnings"}


@pytest.fixture
def script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Script:
    """`evaluate.py` with a small extractor in place of Inception."""
    use_grey_extractor(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return Script(evaluate, capsys, monkeypatch)


def write_folder(folder: Path, images: ndarray, ending: str = ".png", **options: object) -> Path:
    """Write images in a shuffled order of names, some of them in a subfolder."""
    (folder / "more").mkdir(parents=True)
    names = np.random.default_rng(len(images)).permutation(len(images))
    for name, image in zip(names, images, strict=True):
        place = folder / "more" if name % 3 == 0 else folder
        Image.fromarray(image).save(place / f"{name}{ending}", **options)
    return folder


def record_scores(script: Script, name: str, against: str) -> dict:
    status, out, _ = script.run(name, "--against", against, "--half", "--record", f"{name}.json")
    assert status == 0
    assert "repeated images" in out
    return read_record(Path(f"{name}.json")).values


def test_a_shuffled_folder_scores_as_the_file_to_the_last_digit(script: Script, tmp_path: Path):
    """The samples and the reference are shuffled alike."""
    np.savez("a.npz", arr_0=SAMPLES)
    np.savez("real.npz", arr_0=REAL)
    write_folder(tmp_path / "a", SAMPLES)
    write_folder(tmp_path / "real", REAL)
    by_file = record_scores(script, "a.npz", "real.npz")
    by_folder = record_scores(script, "a", "real")
    scores = {name: value for name, value in by_file.items() if name not in ABOUT}
    assert {"fid", "is", "is_se", "kid", "mind", "precision_half"} <= set(scores)
    for name, value in scores.items():
        assert np.array_equal(by_folder[name], value, equal_nan=True), name

    # A folder's digest is that of its images, under whatever names.
    write_folder(tmp_path / "again", SAMPLES[::-1])
    again = record_scores(script, "again", "real.npz")
    digests = [values["manifest"]["model"]["samples"]["sha256"] for values in (by_folder, again)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "ending, options, word",
    [
        (".jpg", {"quality": 95}, "JPEG"),
        (".webp", {"quality": 90}, "lossy WebP"),
        (".tif", {"compression": "jpeg"}, "TIFF with"),
    ],
)
def test_lossy_pictures_are_refused_unless_named_and_then_recorded(
    ending: str, options: dict, word: str, script: Script, tmp_path: Path
):
    np.savez("real.npz", arr_0=REAL)
    write_folder(tmp_path / "a", SAMPLES[:20], ending, **options)
    error = script.refuse("a", "--against", "real.npz", "--record", "a.json")
    assert "is a lossy picture" in error and word in error
    assert not Path("a.json").exists()

    status, out, _ = script.run("a", "--against", "real.npz", "--lossy", "--record", "a.json")
    assert status == 0
    assert "20 of 20 files in a are lossy" in out
    (kind,) = read_record(Path("a.json")).values["manifest"]["measure"]["image"]["lossy"].items()
    assert word in kind[0] and kind[1] == 20


@pytest.mark.parametrize("ending, options", [(".webp", {"lossless": True}), (".bmp", {})])
def test_other_lossless_pictures_score_alike(
    ending: str, options: dict, script: Script, tmp_path: Path
):
    np.savez("a.npz", arr_0=SAMPLES[:40])
    write_folder(tmp_path / "a", SAMPLES[:40], ending, **options)
    values = [record_scores(script, name, "a.npz") for name in ("a.npz", "a")]
    assert values[0]["fid"] == values[1]["fid"]
    assert values[1]["in_reference"] == 40


def save_jpeg_as_png(folder: Path) -> None:
    Image.fromarray(SAMPLES[0]).save(folder / "x.png", "JPEG")


def save_16_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(folder / "x.png")


def save_transparent(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 7, 4), np.uint8)).save(folder / "x.png")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt: is no picture"),
        (
            lambda folder: Image.fromarray(IMAGES[0]).save(folder / "x.png"),
            "holds images of 2 sizes, such as",
        ),
        (lambda folder: (folder / "x.png").write_bytes(b"<html>"), "x.png: cannot be decoded"),
        (save_jpeg_as_png, "x.png: is a lossy picture (JPEG)"),
        (save_16_bits, "x.png: has"),
        (save_transparent, "x.png: has transparent pixels"),
    ],
    ids=["text", "sizes", "damaged", "JPEG under another ending", "16 bits", "transparent"],
)
def test_unfit_folders_are_one_line_and_nothing_is_written(
    spoil, complaint: str, script: Script, tmp_path: Path
):
    np.savez("real.npz", arr_0=REAL)
    spoil(write_folder(tmp_path / "a", SAMPLES[:9]))
    before = sorted(tmp_path.iterdir())
    assert complaint in script.refuse("a", "--against", "real.npz", "--record", "a.json")
    assert complaint in script.refuse("real.npz", "--against", "a")
    assert complaint in script.refuse("reference", "a", "--out", "b.npz")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [("a", "--against", "real.npz"), ("reference", "a")])
def test_an_empty_folder_is_one_line(command: tuple[str, ...], script: Script, tmp_path: Path):
    np.savez("real.npz", arr_0=REAL)
    (tmp_path / "a").mkdir()
    assert "a: is empty" in script.refuse(*command)
    assert "a: is empty" in script.refuse("real.npz", "--against", "a")
    assert not Path("a-reference.npz").exists()


# ---- Repeats


def test_repeats_are_counted_and_withhold_the_errors(script: Script, tmp_path: Path):
    near = np.clip(SAMPLES[:4].astype(int) + 1, 0, 255).astype(np.uint8)
    images = np.concatenate([SAMPLES, SAMPLES[:3], SAMPLES[:3], near, REAL[:2]])
    np.savez("real.npz", arr_0=REAL)
    np.savez("plain.npz", arr_0=SAMPLES)
    write_folder(tmp_path / "a", images)

    # Errors of scores assume that images are drawn independently.
    values = record_scores(script, "a", "real.npz")
    assert values["repeated"] == 6
    assert values["near_copies"] == 4 + 4 + 6
    assert values["in_reference"] == 2
    assert np.isnan([values["is_se"], values["precision_se"], values["coverage_se"]]).all()
    assert any("are withheld" in text for text in values["warnings"])

    # Images without repeats.
    plain = record_scores(script, "plain.npz", "real.npz")
    assert plain["repeated"] == plain["near_copies"] == plain["in_reference"] == 0
    assert np.isfinite([plain["is_se"], plain["precision_se"]]).all()


# ---- References


def test_a_reference_says_what_it_is_of_and_scores_as_its_folder(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reference, "LAYERS", NARROW_LAYERS)
    write_folder(tmp_path / "real", REAL)
    np.savez("a.npz", arr_0=SAMPLES)
    status, out, _ = script.run("reference", "real", "--out", "stats.npz")
    assert status == 0
    assert "90 images 5 x 7" in out
    with np.load("stats.npz") as stored:
        made = json.loads(str(stored["made"]))
    assert (made["num"], made["size"], made["crop"]) == (90, [5, 7], None)
    assert made["features"]["sha256"] == "0" * 64

    by_folder = record_scores(script, "a.npz", "real")
    by_file = record_scores(script, "a.npz", "stats.npz")
    assert by_file["fid"] == pytest.approx(by_folder["fid"], rel=1e-9)
    assert made["sha256"] == by_folder["manifest"]["measure"]["reference"]["sha256"]

    # It is written again, but replaces nothing else; other features refuse it.
    assert script.run("reference", "real", "--out", "stats.npz")[0] == 0
    assert "is no reference" in script.refuse("reference", "real", "--out", "a.npz")
    made["features"]["sha256"] = "1" * 64
    with np.load("stats.npz") as stored:
        arrays = dict(stored) | {"made": np.array(json.dumps(made))}
    np.savez("stats.npz", **arrays)
    assert "are of features 1111" in script.refuse("a.npz", "--against", "stats.npz")


def test_a_reference_is_cropped_as_adm_does(script: Script, tmp_path: Path):
    folder = write_folder(tmp_path / "real", REAL)
    Image.fromarray(DRAW.integers(0, 256, (16, 9, 3), dtype=np.uint8)).save(folder / "large.png")
    status, out, _ = script.run("reference", "real", "--size", "4")
    assert status == 0
    assert "91 images 4 x 4" in out
    with np.load("real-reference.npz") as stored:
        made = json.loads(str(stored["made"]))
    assert made["crop"] == CROPS[Crop.ADM]
    assert made["stored_sizes"] == {"num": 2, "smallest": [5, 7], "largest": [16, 9]}
