"""Data that are not what their name says are refused; what is left out is counted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.engine.data import checks, locate, pictures
from experiments.engine.data.checks import KnownSplit, check_cifar10, content_digest
from experiments.engine.data.locate import find_cifar10
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.data.pixels import write_pixels
from experiments.engine.data.sets import load
from experiments.engine.specs.spec import Data

SET = Data("crops", size=4, channels=3, num_classes=2)
LEVELS = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
UNIT = (LEVELS / 127.5 - 1).astype(np.float32)
UNIT[0, 0, 0, :2] = (-1, 1)


@pytest.mark.parametrize(
    "names, fits",
    [
        (["train.parquet"], True),
        (["train-00000-of-00001.parquet"], True),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], True),
        (["train-00000-of-00002.parquet"], False),
        (["train-00001-of-00002.parquet"], False),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], False),
        (["train.parquet", "train-00000-of-00001.parquet"], False),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], False),
        (["train-00000-of-00001.parquet", "train-00000-of-00001-copy.parquet"], False),
    ],
)
def test_every_part_of_a_table_is_there_once(names: list[str], fits: bool, tmp_path: Path):
    for name in names:
        (tmp_path / name).touch()
    if fits:
        assert [path.name for path in find_cifar10(tmp_path, "train")] == names
        return
    with pytest.raises(ValueError, match="parts are missing, doubled or of different tables"):
        find_cifar10(tmp_path, "train")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """A set of 20 images that stands for the test split, known by its digest and its means."""
    labels = np.arange(20) % 10
    draw = np.random.default_rng(1)
    images = draw.integers(0, 10, (20, 3, 32, 32), dtype=np.uint8)
    images += (20 * labels).astype(np.uint8)[:, None, None, None]
    means = tuple(tuple(images[labels == k].mean((0, 2, 3)) / 255) for k in range(10))
    split = KnownSplit(20, {content_digest(images, labels): "a known copy"}, means)
    monkeypatch.setattr(checks, "CIFAR10_SPLITS", {"test": split})
    return images, labels


def test_a_known_set_is_known_in_any_order_and_encoding(small: tuple[np.ndarray, np.ndarray]):
    images, labels = small
    order = np.random.default_rng(2).permutation(20)
    assert check_cifar10(images[order], labels[order], "test", "parquet") == "a known copy"
    assert check_cifar10(images, labels, "test", "torchvision") == "published"
    images = images.copy()
    images[3, 0, 0, 0] ^= 1
    assert check_cifar10(images, labels, "test", "parquet").startswith("unknown copy, content ")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, y: (x[:10], y[:10]), "10 images are not CIFAR-10's test split, which has 20"),
        (lambda x, y: (np.r_[x, x], np.r_[y, y]), "40 images are not"),
        (lambda x, y: (x, np.r_[y[:-1], 0]), "has 2 images of each class, here are 3, 2"),
        (lambda x, y: (x, (y + 1) % 10), "class 0 has mean levels"),
        (lambda x, y: (255 - x, y), "class 0 has mean levels"),
        (lambda x, y: (x[:, ::-1] + np.uint8(9), y), "class 0 has mean levels"),
        (lambda x, y: (x[np.arange(20) % 10], y), "rows 0 and 10 hold the same image"),
    ],
)
def test_another_content_is_refused(change, words: str, small: tuple[np.ndarray, np.ndarray]):
    with pytest.raises(ValueError, match=words) as failure:
        check_cifar10(*change(*small), "test", "parquet")
    assert "\n" not in str(failure.value)


def write(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(8) % 2)


@pytest.mark.parametrize(
    "images, words",
    [
        (LEVELS, ""),
        (UNIT, ""),
        (np.asfortranarray(UNIT), ""),
        (UNIT / 2 + 0.5, "float32 in 0..1"),
        (UNIT / 2, r"float32 in -0\.5..0\.5"),
        (UNIT * 127.5 + 127.5, r"float32 in 0\.\.255"),
        (UNIT * 1.01, r"float32 in -1\.01\.\.1\.01"),
        (np.where(np.arange(8)[:, None, None, None] == 7, np.nan, UNIT), "float32 in nan"),
        (np.where(UNIT == 1, np.inf, UNIT), r"\.\.inf"),
        (LEVELS // 128, r"uint8 in 0\.\.1"),
        (LEVELS.astype(np.int64), "int64"),
        (LEVELS.astype(np.uint16) * 257, "uint16"),
        (LEVELS > 127, "bool"),
        (UNIT.astype(np.float16), "float16"),
        (UNIT.astype(np.float64), "float64"),
        (UNIT.astype(">f4"), ">f4"),
    ],
)
def test_arrays_hold_grey_levels_or_pixels(
    images: np.ndarray, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    keep = images.dtype if images.dtype != np.float64 or words == "float64" else np.float32
    write(tmp_path / "crops", images.astype(keep))
    for _ in range(2):  # measured, then from what was kept
        if words:
            with pytest.raises(ValueError, match=words):
                load(SET)
        else:
            assert load(SET).take(torch.arange(8))[0].abs().max() <= 1


def test_an_array_that_changed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    write(tmp_path / "crops", UNIT)
    load(SET)
    write(tmp_path / "crops", UNIT * 2)
    with pytest.raises(ValueError, match=r"float32 in -2\.\.2"):
        load(SET)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"no"])
def test_a_damaged_array_is_named(damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    write(tmp_path / "crops", UNIT)
    path = tmp_path / "crops" / "images.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images\.npy cannot be read"):
        load(SET)


def write_classes(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(root / name / "a.png")
    return root


@pytest.mark.parametrize(
    "names, order",
    [
        ("0 1 2 10", "0 1 2 10"),
        ("1 9 10 100", "1 9 10 100"),
        ("007 010 100", "007 010 100"),
        ("class_2 class_10 class_1", "class_1 class_2 class_10"),
        ("n02 n01 n10", "n01 n02 n10"),
        ("cat ant bee", "ant bee cat"),
        ("cat2 ant10", "ant10 cat2"),
        ("1 01", "are the same number"),
        ("1 2 cat", "order of labels is ambiguous"),
    ],
)
def test_classes_named_by_numbers_count_as_numbers(names: str, order: str, tmp_path: Path):
    root = write_classes(tmp_path / "images", names.split())
    num = len(names.split())
    if sorted(order.split()) != sorted(names.split()):
        with pytest.raises(ValueError, match=order):
            find_pictures(root, num)
        return
    found = find_pictures(root, num)
    assert found.classes == tuple(order.split()) and found.labels == tuple(range(num))


def test_the_order_of_labels_is_written_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    out = tmp_path / "crops"
    write_pixels(find_pictures(write_classes(tmp_path / "a", ["9", "10"]), 2), out, 4, 1)
    assert (out / "classes.txt").read_text() == "9\n10\n"
    monkeypatch.setattr("experiments.engine.data.sets.check_levels", lambda *_: None)
    assert load(SET).identity["data_classes"]

    # Other classes do not continue the folder, and a damaged list is not used.
    (out / "labels.npy").rename(tmp_path / "labels.npy")
    other = find_pictures(write_classes(tmp_path / "b", ["10", "11"]), 2)
    with pytest.raises(ValueError, match="label 0 is 9 there and 10 here"):
        write_pixels(other, out, 4, 1)
    (tmp_path / "labels.npy").rename(out / "labels.npy")
    (out / "classes.txt").write_text("9\n")
    with pytest.raises(ValueError, match="names 1 classes, the labels count 2"):
        load(SET)
    (out / "classes.txt").unlink()
    assert load(SET).identity == {}


def test_imagefolders_pictures_are_taken_and_the_rest_is_counted(tmp_path: Path):
    """The pictures are those of torchvision's ImageFolder; other files are counted by kind."""
    root = write_classes(tmp_path / "images", ["ant", "bee"])
    ant = root / "ant"
    image = Image.new("RGB", (8, 8))
    for name in ("b.TIF", "c.ppm", "d.webp", "e.bmp", "sub/deep/f.PNG", "._real.png", ".g.jpg"):
        (ant / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(ant / name)

    # What lies beside pictures in folders of real people.
    for name in ("x.gif", "y.GIF", "z.jfif", "README", ".DS_Store", "Thumbs.db", "._a.png"):
        (ant / name).write_bytes(b"\0\5\x16\7")
    os.mkfifo(ant / "pipe.png")
    os.symlink(ant, ant / "sub" / "circle")
    (root / "__MACOSX").mkdir()
    (root / "list.txt").touch()
    ours = find_pictures(root, 2)

    # ImageFolder stumbles over some of it.
    import torchvision

    (root / "__MACOSX").rmdir()
    (ant / "sub" / "circle").unlink()
    (ant / "._a.png").unlink()
    (ant / "pipe.png").unlink()
    samples = torchvision.datasets.ImageFolder(str(root)).samples
    theirs = [str(Path(path).relative_to(root)) for path, _ in samples]
    assert list(ours.files) == theirs
    assert len(theirs) == 9

    # Nothing is left out in silence.
    assert ours.left_out == {
        "files ending in .gif": 2,
        "files ending in .jfif": 1,
        "files without an ending": 1,
        "companion files of an operating system": 3,
        "pipes, sockets or devices": 1,
        "links to a folder above them": 1,
        "hidden or companion folders": 1,
        "files beside the class folders": 1,
    }
    assert "files ending in .gif: 2" in pictures.describe_left_out(ours.left_out)


def test_names_that_are_no_utf8_are_read_and_named(tmp_path: Path):
    root = os.fsencode(tmp_path / "images")
    for name in (b"caf\xe9", b"the"):
        os.makedirs(root + b"/" + name)
        Image.new("RGB", (8, 8)).save(os.fsdecode(root + b"/" + name + b"/\xff.png"))
    found = find_pictures(tmp_path / "images", 2)
    write_pixels(found, tmp_path / "out", 4, 1)
    assert (tmp_path / "out" / "classes.txt").read_bytes() == b"caf\xe9\nthe\n"
    checks.compare_classes(tmp_path / "out", found.classes)
    assert pictures.describe_labels(found.classes) == r"label 0 is caf\xe9, label 1 is the"
    (found.root / found.files[0]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"caf\\xe9/\\xff\.png cannot be decoded"):
        read_picture(found.root / found.files[0], 4)
