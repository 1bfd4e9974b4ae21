"""Parts of a set that is split, and pixels folded into channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.engine.data.quantise import fold, mirror, unfold
from experiments.engine.data.sets import ImageSet, Part, load, split_indices, unfolded
from experiments.engine.specs.spec import Data

DIGITS = Data("digits", size=8, channels=1, num_classes=10, split="held_out")


def test_the_parts_of_digits_are_disjoint_and_make_the_whole():
    parts = {part: load(DIGITS, part) for part in Part}
    whole = load(replace(DIGITS, split="whole"))
    assert all(isinstance(part, ImageSet) for part in parts.values())
    assert {part.value: len(images) for part, images in parts.items()} == {
        "train": 1259,
        "validation": 179,
        "test": 359,
    }

    # Every image of the whole set is in exactly one part, with its label.
    def contents(images: ImageSet) -> list[bytes]:
        return [x.tobytes() + bytes([y]) for x, y in zip(images.images, images.labels, strict=True)]

    together = [content for images in parts.values() for content in contents(images)]
    assert sorted(together) == sorted(contents(whole))


def test_every_part_has_its_share_of_every_class():
    whole = load(replace(DIGITS, split="whole"))
    sizes = np.bincount(whole.labels)
    assert np.array_equal(np.bincount(load(DIGITS, Part.TEST).labels), np.round(0.2 * sizes))
    assert np.array_equal(np.bincount(load(DIGITS, Part.VALIDATION).labels), np.round(0.1 * sizes))


def test_a_split_depends_on_its_name_and_on_nothing_else():
    labels = np.repeat([0, 1, 2], 11)
    shares = {Part.TEST: 0.2}
    first, again = (split_indices(labels, "a", shares) for _ in range(2))
    other = split_indices(labels, "b", shares)
    assert torch.equal(first[Part.TEST], again[Part.TEST])
    assert not torch.equal(first[Part.TEST], other[Part.TEST])


@pytest.mark.parametrize("sizes", [(11, 1), (11, 2), (2, 11)])
def test_a_class_without_images_in_a_part_is_refused(sizes: tuple[int, ...]):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    small = int(np.argmin(sizes))
    with pytest.raises(ValueError, match=f"leaves class {small} without test images"):
        split_indices(labels, "tiny", {Part.TEST: 0.2})


@pytest.mark.parametrize(
    "data, part, message",
    [
        (replace(DIGITS, split="whole"), Part.TEST, "used whole, so it has no test images"),
        (replace(DIGITS, split="halves"), Part.TRAIN, "unknown split 'halves'"),
    ],
)
def test_a_part_that_a_set_does_not_have_is_refused(data: Data, part: Part, message: str):
    with pytest.raises(ValueError, match=message):
        load(data, part)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_folding_is_undone_and_mirrors_as_pixels_do(side: int):
    images = torch.randn(2, 3, 2 * side, 4 * side)
    folded = fold(images, side)
    assert folded.shape == (2, 3 * side**2, 2, 4)
    assert torch.equal(unfold(folded, side), images)
    assert torch.equal(unfold(mirror(folded, side), side), images.flip(-1))


def test_a_folded_set_knows_its_pixels():
    folded = Data("cifar10", size=16, channels=12, num_classes=10, fold=2)
    assert unfolded(folded) == Data("cifar10", size=32, channels=3, num_classes=10)
