"""Latents are judged by their numbers, and sets by theirs, once for each state of a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.engine.data import checks, cifar10, locate
from experiments.engine.data.checks import check_cifar10, check_latents
from experiments.engine.data.encode import EncodingJob
from experiments.engine.data.latents import LatentSet
from experiments.engine.data.sets import load
from experiments.engine.records.measured import measure_once
from experiments.engine.specs.spec import Data
from tests.support.latent_sets import declared

Change = Callable[[np.ndarray], np.ndarray]
GOOD = np.random.default_rng(0).normal(0, 4, (3, 2, 8, 2, 2)).astype(np.float32)
GOOD[:, :, 4:] = np.abs(GOOD[:, :, 4:]) + 1e-3


def set_one(value: float, channel: int) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[-1, 1, channel, 0, 0] = value
        return array

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x, ""),
        (set_one(np.nan, 0), "means lie in nan"),
        (set_one(np.nan, 7), "deviations lie in nan"),
        (set_one(np.inf, 3), r"means lie in .*\.\.inf"),
        (set_one(-np.inf, 0), "means lie in -inf"),
        (set_one(0, 5), r"deviations lie in 0\.\."),
        (set_one(-2, 4), r"deviations lie in -2\.\."),  # log variances
        (set_one(5e4, 4), r"deviations lie in .*\.\.5e\+04"),
        (lambda x: x * 1000, "means lie in"),
        (np.zeros_like, r"means lie in 0\.\.0"),
        (lambda x: x[:, :, ::-1], "deviations lie in -"),
    ],
)
def test_moments_are_those_of_a_vae(change: Change, words: str, tmp_path: Path):
    path = tmp_path / "shard-00004.npy"
    np.save(path, change(GOOD.copy()))
    for _ in range(2):  # measured, then from what was kept
        if words:
            with pytest.raises(ValueError, match=rf"shard-00004\.npy: its {words}") as failure:
                check_latents(path, np.load(path), "moments")
            assert "\n" not in str(failure.value)
        else:
            check_latents(path, np.load(path), "moments")


@pytest.mark.parametrize("value, fits", [(0, True), (-9, True), (np.nan, False), (2e3, False)])
def test_fixed_samples_have_either_sign(value: float, fits: bool, tmp_path: Path):
    path = tmp_path / "shard-00000.npy"
    samples = np.ascontiguousarray(GOOD[:, :, :4])
    np.save(path, set_one(value, 1)(samples))
    if fits:
        check_latents(path, np.load(path), "fixed")
        return
    with pytest.raises(ValueError, match="its samples lie in"):
        check_latents(path, np.load(path), "fixed")


def damage_shard(folder: Path) -> None:
    path = folder / "shard-00001.npy"
    stored = np.load(path)
    stored[2, 0, 1, 3, 3] = np.nan
    np.save(path, stored)


def damage_labels(folder: Path) -> None:
    labels = np.load(folder / "labels.npy")
    labels[-1] = 3
    np.save(folder / "labels.npy", labels)


def narrow_shard(folder: Path) -> None:
    path = folder / "shard-00001.npy"
    np.save(path, np.load(path).astype(np.float16))


def shorten_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:-1])


def miscount(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["num_images"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_shard, r"shard-00001\.npy: its means lie in nan"),
        (narrow_shard, r"shard-00001\.npy holds float16"),
        (damage_labels, r"labels\.npy: labels must lie in 0\.\.2, got 0\.\.3"),
        (shorten_labels, r"labels\.npy holds int64 \(11,\)"),
        (miscount, "declares 13 images, and its shards hold 12"),
    ],
)
def test_a_set_of_latents_is_judged_when_it_is_loaded(
    damage: Callable[[Path], None], words: str, job: EncodingJob, latents: Path, tmp_path: Path
):
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    assert len(LatentSet(folder, declared(job.vae))) == 12
    damage(folder)
    with pytest.raises(ValueError, match=words) as failure:
        LatentSet(folder, declared(job.vae))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "labels, words",
    [
        ([0, 1, 2, 0, 1, 2], ""),
        ([0, 1, 2, 0, 1], "5 of ImageNet's 6 training images, 3 of 3 classes"),
        ([0, 1, 1, 0, 1, 0], "6 of ImageNet's 6 training images, 2 of 3 classes"),
        ([0], "1 of ImageNet's 6 training images, 1 of 3 classes"),
        ([0, 1, 2, 0, 1, 2, 2], "holds 7 images, and ImageNet has 6"),
    ],
)
def test_a_part_of_imagenet_is_called_a_part(
    labels: list[int],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Fewer images than the whole set has are identified as a part; more are refused."""
    monkeypatch.setattr(checks, "IMAGENET_IMAGES", 6)
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    data = Data("imagenet4_pixels", size=4, channels=3, num_classes=3)
    folder = tmp_path / data.name
    folder.mkdir()
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.integers(0, 256, (len(labels), 3, 4, 4), dtype=np.uint8))
    np.save(folder / "labels.npy", np.array(labels))

    # More images than the whole set has.
    if len(labels) > 6:
        with pytest.raises(ValueError, match=words):
            load(data)
        return
    expected = {"data_part": words} if words else {}
    assert load(data).identity == expected
    assert words in capsys.readouterr().err


def touch(path: Path) -> None:
    """Give a file another time of change and leave its bytes."""
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change, measured",
    [
        (lambda path: None, 1),
        (touch, 2),
        (lambda path: path.write_bytes(b"xyz"), 2),
        (lambda path: path.write_bytes(b"abcd"), 2),
        (lambda path: path.with_name("other").write_bytes(b"x"), 1),
        (lambda path: path.with_name(".file.sum.json").write_text("{"), 2),
        (lambda path: path.with_name(".file.sum.json").write_text("[]"), 2),
        (lambda path: path.with_name(".file.sum.json").unlink(), 2),
    ],
)
def test_a_file_is_measured_once_for_each_state(
    change: Callable[[Path], object], measured: int, tmp_path: Path
):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    calls = []
    for _ in range(2):
        assert measure_once([path], "sum", lambda: calls.append(1) or [1.5, "a"]) == [1.5, "a"]
        change(path)
        change = lambda path: None  # noqa: E731
    measure_once([path], "sum", lambda: calls.append(1))
    assert len(calls) == measured
    measure_once([path], "sum", lambda: calls.append(1), version="2")
    assert len(calls) == measured + 1


def test_a_folder_that_may_only_be_read_is_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(target: Path):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr("experiments.engine.records.measured.written_whole", refuse)
    (tmp_path / "file").touch()
    assert [measure_once([tmp_path / "file"], "sum", lambda: 7) for _ in range(2)] == [7, 7]


def test_cifars_digests_are_kept_beside_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(b"a")
    parts = [tmp_path / f"train-0000{number}-of-00002.parquet" for number in range(2)]
    for path in parts:
        path.write_bytes(b"a")

    # The bytes: a part that changes is read again, in a folder as beside it.
    for paths, file in ((parts, parts[1]), ([batches], batches / "data_batch_1")):
        first = cifar10.file_digest(paths)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read again"))
            assert cifar10.file_digest(paths) == first
        file.write_bytes(b"b")
        assert cifar10.file_digest(paths) != first

    # The decoded images: another PIL may decode otherwise.
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(10)
    means = tuple(tuple(image.mean((1, 2)) / 255) for image in images)
    monkeypatch.setattr(checks, "CIFAR10_SPLITS", {"train": checks.KnownSplit(10, {}, means)})
    digests = []
    digest = checks.content_digest
    monkeypatch.setattr(
        checks, "content_digest", lambda *pair: digests.append(digest(*pair)) or digests[-1]
    )
    copies = {check_cifar10(images, labels, "train", "parquet", parts) for _ in range(2)}
    assert copies == {f"unknown copy, content {digests[0][:16]}"} and len(digests) == 1
    monkeypatch.setattr(checks.Image, "__version__", "0.0")
    check_cifar10(images, labels, "train", "parquet", parts)
    assert len(digests) == 2
