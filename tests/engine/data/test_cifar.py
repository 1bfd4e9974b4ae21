"""CIFAR-10 from parquet and from torchvision's folder, and files that are neither."""

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import prepare
from experiments.declared.protocols import CIFAR10
from experiments.engine.data import cifar10 as cifar
from experiments.engine.data import locate as sources
from experiments.engine.data.cifar10 import read_cifar10
from experiments.engine.data.locate import find_cifar10
from experiments.engine.data.sets import load
from tests.support.cifar import accept_small_sets, file_of, pixels, write_parquet


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    accept_small_sets(monkeypatch)
    return tmp_path / "cifar10"


def test_parquet_files_are_read_in_their_order(folder: Path):
    """The rows of two files follow each other, scaled to [-1, 1]."""
    images = pixels(12)
    files = [file_of(image) for image in images]
    write_parquet(folder / "train-00000-of-00002.parquet", files[:7], [0, 1, 2, 3, 4, 5, 6])
    write_parquet(folder / "train-00001-of-00002.parquet", files[7:], [9, 8, 7, 6, 5])
    write_parquet(folder / "test.parquet", files[:1], [3])

    # The training part.
    cifar_set = load(CIFAR10.data)
    x, y = cifar_set.take(torch.arange(12))
    assert y.tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 8, 7, 6, 5]
    assert np.abs(x.numpy() - (images.transpose(0, 3, 1, 2) / 127.5 - 1)).max() < 1e-6
    assert cifar_set.flip
    assert cifar_set.identity.keys() == {"data_source", "data_sha256"}
    assert cifar_set.identity["data_source"] == "parquet"

    # The test part.
    assert len(read_cifar10(find_cifar10(folder, "test"), "test")[0]) == 1


def test_the_digest_is_of_the_pixels_and_labels(folder: Path):
    """Other labels and other pixels have other digests, and an equal set has the same."""
    digests = []
    for name, images, label in (
        ("a", pixels(2), 1),
        ("b", pixels(2), 2),
        ("c", pixels(2, seed=1), 1),
        ("d", pixels(2), 1),
    ):
        path = folder / name / "train.parquet"
        write_parquet(path, [file_of(image) for image in images], [label, label])
        digests.append(read_cifar10([path], "train")[2]["data_sha256"])
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


def test_jpeg_and_grey_images_are_read(folder: Path):
    """A JPEG is read as it is, and a grey image in three equal channels."""
    images = np.repeat(np.repeat(pixels(2)[:, ::8, ::8], 8, 1), 8, 2)
    files = [file_of(images[0], "JPEG"), file_of(images[1], mode="L")]
    write_parquet(folder / "train.parquet", files, [0, 1])
    read, _, identity = read_cifar10([folder / "train.parquet"], "train")
    assert identity["data_converted"] == "1 L"
    assert read.shape == (2, 3, 32, 32)
    assert (read[1] == read[1, :1]).all()
    assert np.abs(read[0].transpose(1, 2, 0).astype(int) - images[0]).mean() < 25


@pytest.mark.parametrize(
    "files, labels, columns, words",
    [
        (
            [file_of(pixels(1)[0]), b"no image"],
            [0, 1],
            ("img", "label"),
            "row 1 cannot be decoded: cannot identify",
        ),
        ([file_of(pixels(1)[0])[:1000]], [0], ("img", "label"), "row 0 cannot be decoded: "),
        (
            [file_of(np.zeros((32, 31, 3), np.uint8))],
            [0],
            ("img", "label"),
            "row 0 is 31 x 32 pixels",
        ),
        ([file_of(pixels(1)[0])], [0], ("image", "label"), "img"),
        ([file_of(pixels(1)[0])], [0.5], ("img", "label"), "float64"),
        ([file_of(pixels(1)[0])], ["cat"], ("img", "label"), "label"),
        ([None], [0], ("img", "label"), "label"),
    ],
)
def test_parquet_files_of_another_kind_are_refused_in_a_line(
    files: list, labels: list, columns: tuple[str, str], words: str, folder: Path
):
    write_parquet(folder / "train.parquet", files, labels, columns)
    with pytest.raises(ValueError, match=f"train.parquet is not CIFAR-10 .*{words}") as failure:
        load(CIFAR10.data)
    assert "\n" not in str(failure.value)


def test_labels_of_more_classes_are_refused(folder: Path):
    write_parquet(folder / "train.parquet", [file_of(pixels(1)[0])], [10])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9"):
        load(CIFAR10.data)


@pytest.mark.parametrize(
    "files, labels, words",
    [
        ([], [], "expected images"),
        ([file_of(pixels(1)[0])], [13], r"must lie in 0\.\.9"),
        ([file_of(pixels(1)[0], mode="P")], [3], ""),
    ],
)
def test_the_command_checks_what_is_there(
    files: list,
    labels: list,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The command says what it finds of either part, or what is wrong with it."""
    write_parquet(folder / "train.parquet", files, labels)
    monkeypatch.setattr("sys.argv", ["prepare.py", "cifar10"])
    status = prepare.main()
    printed = capsys.readouterr()

    # Bad files are one line of error.
    if words:
        assert status == 2
        assert re.search(words, printed.err)
        assert printed.err.count("\n") == 1
    else:
        assert status == 0
        assert printed.out.startswith("train: 1 images from parquet, ")
        assert "converted to RGB: 1 P\ntest: not in" in printed.out


def test_a_file_that_is_no_parquet_is_refused(folder: Path):
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="train.parquet is not CIFAR-10"):
        load(CIFAR10.data)


def write_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write a small set in the published layout, and its checksums into torchvision's table."""
    from torchvision.datasets import CIFAR10 as Published

    base = folder / Published.base_folder
    base.mkdir(parents=True)

    def write(name: str, content: dict[str, object]) -> str:
        """Write a file and return its checksum."""
        pickled = pickle.dumps(content)
        (base / name).write_bytes(pickled)
        return hashlib.md5(pickled).hexdigest()

    # Four images to train and two to test, as flat rows.
    images = pixels(6)
    rows = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
    train = write("data_batch_1", {"data": rows[:4], "labels": [1] * 4})
    test = write("test_batch", {"data": rows[4:], "labels": [1] * 2})
    meta = write("batches.meta", {"label_names": list("abcdefghij")})

    # torchvision opens a file with its checksum only.
    monkeypatch.setattr(Published, "train_list", [["data_batch_1", train]])
    monkeypatch.setattr(Published, "test_list", [["test_batch", test]])
    monkeypatch.setattr(Published, "meta", Published.meta | {"md5": meta})
    return images


def test_torchvisions_folder_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Both parts of the published layout are read."""
    images = write_torchvision(folder, monkeypatch).transpose(0, 3, 1, 2)
    cifar_set = load(CIFAR10.data)
    assert (cifar_set.images == images[:4]).all()
    assert cifar_set.labels.tolist() == [1] * 4
    assert cifar_set.identity["data_source"] == "torchvision"
    assert (read_cifar10(find_cifar10(folder, "test"), "test")[0] == images[4:]).all()


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_with_another_checksum_is_not_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write_torchvision(folder, monkeypatch)
    monkeypatch.chdir(folder)
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="not the published CIFAR-10"):
        load(CIFAR10.data)
    assert not Path("harm").exists()


def test_without_a_network_the_download_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A download that fails says why, and what to do by hand."""

    def refused(*_: object, **__: object) -> None:
        raise OSError("no route\nto the host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refused)
    message = "cannot be downloaded .no route to the host.; put train.parquet"
    with pytest.raises(ValueError, match=message) as failure:
        cifar.download(folder)
    assert "\n" not in str(failure.value)
