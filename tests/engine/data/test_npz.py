"""ADM-style files: what is read, in which order, and what is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from numpy.lib import format as npy

from experiments.engine.data.image_files import POOL, SPATIAL, ImageFile, has_images, write_images
from experiments.engine.scoring.reference import statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def written(path: Path, save: Callable[..., None] = np.savez, **arrays: Any) -> Path:
    save(path, **arrays)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_images_come_in_batches_in_file_order(save: Callable[..., None], size: int, tmp_path: Path):
    images = ImageFile(written(tmp_path / "a.npz", save, arr_0=IMAGES, arr_1=np.arange(7)))
    batches = list(images.batches(size))
    assert len(images) == 7 and [len(batch) for batch in batches[:-1]] == [size] * (
        len(batches) - 1
    )
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    np.testing.assert_array_equal(images.labels, np.arange(7))


def test_the_second_npy_version_is_read(tmp_path: Path):
    member = io.BytesIO()
    npy.write_array(member, IMAGES, version=(2, 0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue())
    np.testing.assert_array_equal(next(ImageFile(tmp_path / "a.npz").batches()), IMAGES)


def test_what_is_written_reads_back_with_numpy_and_here(tmp_path: Path):
    path, made = tmp_path / "a.npz", {"seed": 3, "labels": "random"}
    write_images(
        path, iter([IMAGES[:4], IMAGES[4:]]), IMAGES.shape, np.arange(7), np.arange(7)[::-1], made
    )
    with np.load(path, allow_pickle=False) as plain:
        np.testing.assert_array_equal(plain["arr_0"], IMAGES)
        np.testing.assert_array_equal(plain["arr_1"], np.arange(7))
    images = ImageFile(path)
    assert (
        images.origin == made
        and images.index.tolist() == [6, 5, 4, 3, 2, 1, 0]
        and images.stray == []
    )


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    def broken() -> Any:
        yield IMAGES[:2]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_images(tmp_path / "a.npz", broken(), IMAGES.shape, np.arange(7), np.arange(7), {})
    assert not list(tmp_path.iterdir())


def test_stray_statistics_in_a_sample_file_are_seen(tmp_path: Path):
    path = written(tmp_path / "a.npz", arr_0=IMAGES, mu=np.zeros(POOL), sigma=np.eye(2))
    assert ImageFile(path).stray == ["mu", "sigma"]


def test_statistics_keep_their_covariance(tmp_path: Path):
    mean, root = (
        np.random.default_rng(1).standard_normal(SPATIAL),
        np.random.default_rng(2).standard_normal(SPATIAL),
    )
    path = written(tmp_path / "a.npz", mu_s=mean, sigma_s=np.outer(root, root))
    found = statistics(path)
    assert set(found) == {"spatial"} and not has_images(path)
    np.testing.assert_array_equal(found["spatial"].mean, mean)
    np.testing.assert_array_equal(found["spatial"].cov, np.outer(root, root))


class Touch:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("pickled-code-ran"),)


def object_array() -> ndarray:
    array = np.empty((), object)
    array[()] = Touch()
    return array


@pytest.mark.parametrize(
    "arrays, complaint",
    [
        (dict(images=IMAGES), "holds no images"),
        (dict(arr_0=IMAGES / 255), "float64"),
        (dict(arr_0=IMAGES.astype(np.int64)), "int64"),
        (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "expected images"),
        (dict(arr_0=IMAGES[0]), "expected images"),
        (dict(arr_0=IMAGES[:0]), "expected images"),
        (dict(arr_0=np.asfortranarray(IMAGES)), "Fortran"),
        (dict(arr_0=IMAGES, arr_1=np.arange(6)), "arr_1"),
        (dict(arr_0=IMAGES, arr_1=np.zeros(7)), "arr_1"),
        (dict(arr_0=object_array()), "object"),
        (dict(arr_0=IMAGES, arr_1=object_array()), "arr_1 is object"),
        (dict(arr_0=IMAGES, arr_1=np.arange(7) - 1), "arr_1 holds -1"),
        (dict(arr_0=IMAGES, made=np.array("[1]")), "made, .* is no JSON object"),
        (dict(arr_0=IMAGES, made=np.array("{")), "made, .* is no JSON object"),
    ],
)
def test_bad_sample_files_are_refused_in_one_line(
    arrays: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=complaint) as caught:
        ImageFile(path)
    assert (
        "\n" not in str(caught.value)
        and "a.npz" in str(caught.value)
        and not Path("pickled-code-ran").exists()
    )


@pytest.mark.parametrize(
    "arrays",
    [
        dict(mu=np.zeros(POOL)),
        dict(mu_s=np.zeros(SPATIAL), sigma_s=np.eye(3)),
        dict(mu_s=np.full(SPATIAL, np.nan), sigma_s=np.zeros((SPATIAL, SPATIAL), np.float32)),
        dict(mu_s=np.zeros(SPATIAL), sigma_s=-np.eye(SPATIAL, dtype=np.float32)),
        dict(
            mu_s=np.zeros(SPATIAL),
            sigma_s=np.eye(SPATIAL, dtype=np.float32) + np.eye(SPATIAL, k=1, dtype=np.float32),
        ),
    ],
)
def test_bad_statistics_are_refused(arrays: dict[str, ndarray], tmp_path: Path):
    with pytest.raises(ValueError, match="a.npz"):
        statistics(written(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize(
    "shape, complaint",
    [((10**12,), r"arr_1 is int64 \(1000000000000,\)"), ((7,), "arr_1 is not readable")],
)
def test_a_header_that_claims_what_is_not_there_is_refused(
    shape: tuple[int, ...], complaint: str, tmp_path: Path
):
    header, images = io.BytesIO(), io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    npy.write_array(images, IMAGES)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", images.getvalue())
        archive.writestr("arr_1.npy", header.getvalue())
    with pytest.raises(ValueError, match=f"a.npz: {complaint}"):
        ImageFile(tmp_path / "a.npz")


def test_a_member_that_is_no_npy_file_is_no_array(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0", IMAGES.tobytes())
    with pytest.raises(ValueError, match="a.npz: holds no images .arr_0., only nothing"):
        ImageFile(tmp_path / "a.npz")


def test_what_is_no_archive_or_cut_short_is_refused(tmp_path: Path):
    """A file that is missing, another kind of file or incomplete is refused."""
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="no such file"):
        ImageFile(path)

    # A web page, and the beginning of an archive.
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not a readable"):
        ImageFile(path)
    whole = written(tmp_path / "b.npz", arr_0=IMAGES).read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="not a readable"):
        ImageFile(path)

    # An archive whose array announces more images than it holds.
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (9, 5, 4, 3)}
    npy.write_array_header_1_0(header, description)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + IMAGES.tobytes())
    with pytest.raises(ValueError, match="cut short after"):
        list(ImageFile(path).batches(4))
