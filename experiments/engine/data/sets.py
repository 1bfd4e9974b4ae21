"""Labelled sets, and the batches of them that a run sees."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments.engine.data.captioned.digits import CaptionedDigits
from experiments.engine.data.captioned.folders import is_coco
from experiments.engine.data.captioned.grammar import NAMES as CAPTIONED
from experiments.engine.data.captioned.pictures import CaptionedLatents
from experiments.engine.data.checks import (
    check_cifar10,
    check_levels,
    check_number,
    identify_classes,
    open_array,
)
from experiments.engine.data.cifar10 import read_cifar10
from experiments.engine.data.latents import LatentSet
from experiments.engine.data.locate import find_cifar10, folder_of, require_content, require_data
from experiments.engine.data.quantise import fold, from_uint8
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Data

WORKERS = 2  # threads that read batches ahead
# Shares of a class's images, in a set that has no test images of its own.
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1


class Part(Enum):
    """A part of a set that is split."""

    TRAIN = "train"
    # For choices, such as learning rates.
    VALIDATION = "validation"
    # Only reported.
    TEST = "test"


class ImageSet:
    """Labelled images in memory or memory-mapped.

    images: (M, C, H, W), pixels in [-1, 1] or grey levels 0..255 as uint8.
    labels: integers (M,).
    flip: whether the trainer mirrors half of the images.
    identity: what identifies the set in records of what is trained on it.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        data: Data,
        identity: dict[str, str] | None = None,
    ) -> None:
        """Wrap arrays; ValueError if they are not what the declaration says."""
        shape = (data.channels, data.size, data.size)
        if images.shape[1:] != shape or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{data.name}: expected images (M, {', '.join(map(str, shape))}) and labels (M,), "
                f"got {images.shape} and {labels.shape}"
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{data.name}: labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= max(1, data.num_classes):
            raise ValueError(
                f"{data.name}: labels must lie in 0..{max(0, data.num_classes - 1)}, "
                f"got {labels.min()}..{labels.max()}"
            )
        self.images = images
        self.labels = labels
        self.flip = data.flip
        self.identity = identity or {}

    def __len__(self) -> int:
        return len(self.labels)

    def take(
        self, indices: Tensor, seed: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read images (N, C, H, W) float32 and labels (N,) at these indices.

        `seed` and `positions` change nothing here; latents are drawn from them.
        """
        rows = indices.numpy()
        stored = self.images[rows]
        if stored.dtype == np.uint8:
            images = from_uint8(torch.from_numpy(stored))
        else:
            images = torch.from_numpy(np.asarray(stored, dtype=np.float32))
        return images, torch.from_numpy(np.asarray(self.labels[rows], dtype=np.int64))


AnySet = ImageSet | LatentSet | CaptionedDigits


def load(data: Data, part: Part = Part.TRAIN) -> AnySet:
    """Load the declared set, or a part of it, from this machine.

    It is scikit-learn's bundled digits, with or without captions, CIFAR-10's training images, a
    folder of latents, captioned or not, or a folder of images.npy and labels.npy.

    Args:
        data: the set.
        part: which part of a set that is split. A set that is not split is its training images.

    Raises:
        ValueError: the set is not on this machine, is not what is declared, or has no such part.
    """
    require_data(data)
    require_content(data)
    if data.name in CAPTIONED:
        return _load_captioned(data, part)
    if data.split == "held_out":
        return _load_part(data, part)
    if data.split != "whole":
        raise ValueError(f"unknown split {data.split!r} of {data.name}; known: whole, held_out")
    if part is not Part.TRAIN:
        raise ValueError(
            f"{data.name} is used whole, so it has no {part.value} images; "
            "declare its split as held_out"
        )
    if data.name == "digits":
        return _load_digits(data)
    if data.name == "cifar10":
        return load_cifar10(data, "train")
    folder = folder_of(data)
    if is_coco(data):
        return CaptionedLatents(folder, data)
    if (folder / "manifest.json").is_file():
        return LatentSet(folder, data)
    images = open_array(folder / "images.npy")
    labels = np.array(open_array(folder / "labels.npy"))
    array_set = ImageSet(images, labels, data, identify_classes(folder, data.num_classes))
    check_levels(folder / "images.npy", images)
    array_set.identity |= check_number(data, labels)
    if data.sha256:
        array_set.identity["data_sha256"] = data.sha256
    return array_set


def unfolded(data: Data) -> Data:
    """Return the same set with its pixels as they are."""
    channels = data.channels // data.fold**2
    return replace(data, size=data.size * data.fold, channels=channels, fold=1)


def split_indices(labels: np.ndarray, name: str, shares: dict[Part, float]) -> dict[Part, Tensor]:
    """Part a set class by class, in an order that its name decides.

    Args:
        labels: integers (M,).
        name: of the set.
        shares: shares of every class, by part; what is left is trained on.

    Returns:
        Rising indices of every part, long.

    Raises:
        ValueError: a part would have no image of a class.
    """
    taken: dict[Part, list[Tensor]] = {part: [] for part in (*shares, Part.TRAIN)}
    for label in np.unique(labels):
        indices = torch.from_numpy(np.flatnonzero(labels == label))
        order = torch.randperm(len(indices), generator=generator_at("split", name, int(label)))
        start = 0
        for part, share in shares.items():
            stop = start + round(share * len(indices))
            taken[part].append(indices[order[start:stop]])
            start = stop
        taken[Part.TRAIN].append(indices[order[start:]])

        # A score by class needs images of every class.
        empty = [part.value for part in taken if not len(taken[part][-1])]
        if empty:
            raise ValueError(
                f"the split of {name} leaves class {label} without {empty[0]} images: it has "
                f"{len(indices)} in all; give the class more images, or use the set whole"
            )
    return {part: torch.cat(pieces).sort().values for part, pieces in taken.items()}


def _load_part(data: Data, part: Part) -> ImageSet:
    """Load a part of a set of pixels that is split."""
    shares = {Part.TEST: TEST_SHARE, Part.VALIDATION: VALIDATION_SHARE}
    if data.name == "cifar10":
        # The published test images are the test part.
        whole = load_cifar10(data, "test" if part is Part.TEST else "train")
        if part is Part.TEST:
            return whole
        shares = {Part.VALIDATION: VALIDATION_SHARE}
    else:
        images = load(replace(data, split="whole"))
        if not isinstance(images, ImageSet):
            raise ValueError(
                f"{data.name} holds latents, which this suite does not split; "
                "declare its split as whole"
            )
        whole = images

    indices = split_indices(whole.labels, data.name, shares)[part].numpy()
    return ImageSet(whole.images[indices], whole.labels[indices], data, whole.identity)


def _load_captioned(data: Data, part: Part) -> CaptionedDigits:
    """Load captioned digits: what is trained on, or all captions with the other digits."""
    if data.split != "held_out":
        raise ValueError(
            f"{data.name} keeps digits and captions from trainings; declare its split as held_out"
        )
    if part is Part.VALIDATION:
        raise ValueError(f"{data.name} has no validation images; take the train or the test part")
    return CaptionedDigits(data, trained=part is Part.TRAIN)


def _load_digits(data: Data) -> ImageSet:
    """Load scikit-learn's digits; a smaller size takes means over areas."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    factor = 8 // data.size
    if data.size * factor != 8:
        raise ValueError(
            "digits have 8 x 8 pixels, or means over areas of them: "
            f"size 1, 2, 4 or 8, not {data.size}"
        )
    areas = digits.images.reshape(-1, 1, data.size, factor, data.size, factor)
    return ImageSet(areas.mean((3, 5)).astype(np.float32) / 8 - 1, digits.target, data)


def load_cifar10(data: Data, split: str) -> ImageSet:
    """Load CIFAR-10's 'train' or 'test' images, and say so if they are another copy.

    Raises:
        ValueError: the images are not on this machine, or are not CIFAR-10.
    """
    paths = find_cifar10(folder_of(data), split)
    if not paths:
        raise ValueError(
            f"CIFAR-10's {split} images are not in data/cifar10 (or $DICO_DATA/cifar10): "
            f"{split}.parquet or cifar-10-batches-py"
        )
    images, labels, identity = read_cifar10(paths, split)
    folded = fold(torch.from_numpy(images), data.fold).numpy()
    image_set = ImageSet(folded, labels, data, identity)
    copy = check_cifar10(images, labels, split, identity["data_source"], paths)
    if copy != "published":
        identity["data_copy"] = copy
        print(
            f"warning: CIFAR-10's {split} images are not known to be the published pixels: {copy}; "
            "scores may differ a little from those on the published ones",
            file=sys.stderr,
        )
    return image_set


def iterate_batches(
    images: AnySet,
    batch: int,
    seed: int,
    steps: range,
    device: torch.device,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of each step's batch on the device.

    Threads read ahead and, for a GPU, pin memory.

    Args:
        images: the set.
        batch: size of the global batch.
        seed: of the run.
        steps: the steps to take.
        device: where the batches go.
        share: a process's share of the global batch. What stands at a place of the global batch
            does not depend on who reads it.
    """

    def read(step: int) -> tuple[Tensor, ...]:
        positions = torch.arange(step * batch, (step + 1) * batch)[share]
        indices = batch_indices(len(images), batch, seed, step)[share]
        tensors = images.take(indices, seed, positions)
        if device.type != "cuda":
            return tensors
        return tuple(tensor.pin_memory() for tensor in tensors)

    for x, y in prefetch(read, steps, WORKERS, 2 * WORKERS):
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of a step: consecutive positions of an endless sequence of permutations."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // size
    parts = [
        _permutation(size, seed, int(epoch))[positions[epochs == epoch] % size]
        for epoch in epochs.unique()
    ]
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_at("order", seed, epoch))


Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Iterator[Result]:
    """Compute `function` of every item in threads, ahead of use; yield the results in order.

    Exceptions surface at their item.

    Args:
        function: what to compute.
        items: its arguments.
        workers: number of threads.
        depth: how many results may be under way.
    """
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= depth:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
