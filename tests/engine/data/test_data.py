"""The order in which a run sees its data, and what is said where data is missing or wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.ablation import TABLE_4
from experiments.declared.protocols import (
    CIFAR10,
    DIGITS,
    DIGITS_WHOLE,
    IMAGENET256,
    IMAGENET256_FIXED,
    IMAGENET512,
    IMAGENET512_FIXED,
)
from experiments.engine.data import locate as sources
from experiments.engine.data import sets
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.data.sets import ImageSet, batch_indices, iterate_batches, load
from experiments.engine.specs.spec import Data
from experiments.engine.specs.stages import Protocol, evaluate_stage

SET = Data("latents", size=4, channels=2, num_classes=3)
BIG = (CIFAR10, IMAGENET256, IMAGENET256_FIXED, IMAGENET512)


def arrays(num: int = 11) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(num * 32, dtype=np.float32).reshape(num, 2, 4, 4), np.arange(num) % 3


def sequence(size: int, batch: int, seed: int, length: int) -> list[int]:
    steps = -(-length // batch)
    return torch.cat([batch_indices(size, batch, seed, step) for step in range(steps)]).tolist()[
        :length
    ]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir()
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = np.array(sequence(23, 5, seed=0, length=4 * 23)).reshape(4, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


@pytest.mark.parametrize("batch", [1, 11, 23, 60])
def test_the_sequence_does_not_depend_on_the_batch_size(batch: int):
    assert sequence(23, batch, seed=3, length=100) == sequence(23, 7, seed=3, length=100)


def test_the_sequence_depends_on_the_seed():
    assert sequence(23, 7, seed=3, length=23) != sequence(23, 7, seed=4, length=23)


def test_a_step_is_found_without_the_ones_before_it():
    steps = [batch_indices(23, 7, 0, step).tolist() for step in range(12)]
    assert [batch_indices(23, 7, 0, step).tolist() for step in reversed(range(12))] == steps[::-1]


def test_digits_are_pixels_of_ten_classes():
    digits = load(DIGITS_WHOLE.data)
    x, y = digits.take(torch.arange(len(digits)))
    assert (x.shape, x.dtype, y.dtype) == ((1797, 1, 8, 8), torch.float32, torch.int64)
    assert (x.min(), x.max(), y.unique().tolist()) == (-1, 1, list(range(10)))


def test_take_gives_what_is_asked_for():
    images, labels = arrays()
    x, y = ImageSet(images, labels, SET).take(torch.tensor([3, 3, 0]))
    assert torch.equal(x, torch.from_numpy(images[[3, 3, 0]])) and y.tolist() == [0, 0, 0]
    x.zero_()
    assert images[3].all()


@pytest.mark.parametrize(
    "shape, labels, words",
    [
        ((11, 2, 4, 5), np.zeros(11, int), r"expected images \(M, 2, 4, 4\)"),
        ((11, 1, 4, 4), np.zeros(11, int), r"got \(11, 1, 4, 4\)"),
        ((11, 2, 4, 4), np.zeros(10, int), r"\(10,\)"),
        ((11, 2, 4, 4), np.zeros((11, 1), int), r"\(11, 1\)"),
        ((11, 2, 4, 4), np.full(11, 3), r"0\.\.2, got 3\.\.3"),
        ((11, 2, 4, 4), np.full(11, -1), r"got -1\.\.-1"),
        ((0, 2, 4, 4), np.zeros(0, int), "latents: "),
        ((11, 2, 4, 4), np.full(11, 0.5), "latents: "),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shape: tuple[int, ...], labels: np.ndarray, words: str):
    with pytest.raises(ValueError, match=words):
        ImageSet(np.zeros(shape, np.float32), labels, SET)


def test_a_folder_of_arrays_is_read_from_the_disk(root: Path):
    images, labels = arrays()
    images = images / 175.5 - 1
    write(root / "latents", images, labels)
    found = load(SET)
    assert isinstance(found.images, np.memmap) and len(found) == 11
    x, y = found.take(torch.tensor([10, 2]))
    assert torch.equal(x, torch.from_numpy(images[[10, 2]])) and y.tolist() == [1, 2]
    x.zero_()
    assert (np.load(root / "latents" / "images.npy") == images).all()


def test_labels_of_other_number_types_are_converted(root: Path):
    images, labels = arrays()
    images = images / 175.5 - 1
    write(root / "latents", images, labels.astype(np.uint8))
    x, y = load(SET).take(torch.arange(11))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and np.allclose(x, images)


def test_grey_levels_become_pixels():
    levels = np.random.default_rng(0).integers(0, 256, (11, 2, 4, 4), dtype=np.uint8)
    x, _ = ImageSet(levels, np.zeros(11, int), SET).take(torch.tensor([4, 0]))
    assert (
        x.dtype == torch.float32
        and np.abs(x.numpy() - (levels[[4, 0]].astype(float) / 127.5 - 1)).max() < 1e-6
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_steps_asked_for_and_a_share_is_a_part(
    workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sets, "WORKERS", workers)
    images, labels = arrays()
    found = ImageSet(images, labels, SET)
    made = list(iterate_batches(found, 6, 2, range(3, 8), torch.device("cpu")))
    share = list(iterate_batches(found, 6, 2, range(3, 8), torch.device("cpu"), slice(4, 6)))
    assert len(made) == 5
    for step, (x, y), (part, _) in zip(range(3, 8), made, share, strict=True):
        expected, _ = found.take(batch_indices(11, 6, 2, step))
        assert torch.equal(x, expected) and len(y) == 6 and torch.equal(part, x[4:6])


def test_an_error_in_a_worker_reaches_the_trainer():
    class Broken(ImageSet):
        def take(self, *_):
            raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        next(iterate_batches(Broken(*arrays(), SET), 6, 0, range(9), torch.device("cpu")))


@pytest.mark.parametrize(
    "protocol, words",
    [
        (CIFAR10, ("train.parquet", "cifar-10-batches-py", "prepare.py cifar10")),
        (IMAGENET256, ("prepare.py latents --protocol imagenet256 ", "1000 class folders")),
        (
            IMAGENET256_FIXED,
            ("prepare.py latents --protocol imagenet256_fixed ", "DICO_DATA/imagenet256_fixed)"),
        ),
        (
            IMAGENET512_FIXED,
            ("prepare.py latents --protocol imagenet512_fixed ", "DICO_DATA/imagenet512_fixed)"),
        ),
        (IMAGENET512, ("prepare.py latents --protocol imagenet512 ",)),
    ],
)
def test_missing_data_is_one_line_that_says_what_to_provide(
    protocol: Protocol, words: tuple[str, ...], root: Path
):
    with pytest.raises(ValueError) as failure:
        load(protocol.data)
    line = str(failure.value)
    assert "\n" not in line and str(root) not in line
    assert all(word in line for word in (protocol.name, "DICO_DATA", *words))


def test_only_the_missing_file_is_asked_for(root: Path):
    (root / "latents").mkdir()
    (root / "latents" / "images.npy").touch()
    with pytest.raises(ValueError, match="needs labels.npy in"):
        require_data(SET)


@pytest.mark.parametrize("protocol", BIG, ids=lambda protocol: protocol.name)
def test_missing_features_are_one_line(protocol: Protocol):
    with pytest.raises(ValueError, match="inception") as failure:
        require_features(evaluate_stage(TABLE_4.baseline, protocol, 0))
    assert "\n" not in str(failure.value)


def test_digits_need_nothing(root: Path):
    require_data(DIGITS.data)
    require_features(evaluate_stage(TABLE_4.baseline, DIGITS, 0))
