"""Labelled sets and the order in which a run sees them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments.engine.data.cifar10 import read_cifar10
from experiments.engine.data.latents import LatentSet
from experiments.engine.data.locate import find_cifar10, folder_of, require_data
from experiments.engine.data.quantise import from_uint8
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Data


class ImageSet:
    """Images (M, C, H, W), pixels in [-1, 1] or grey levels 0..255 as uint8, and labels (M,), in memory or memory-mapped.

    `flip` asks the trainer to mirror half of them; `identity` goes into the records of what is trained on them.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        data: Data,
        identity: dict[str, str] | None = None,
    ) -> None:
        if (
            images.shape[1:] != (data.channels, data.size, data.size)
            or labels.shape != images.shape[:1]
            or not len(labels)
        ):
            raise ValueError(
                f"{data.name}: expected images (M, {data.channels}, {data.size}, {data.size}) and labels (M,), got {images.shape} and {labels.shape}"
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{data.name}: labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= data.num_classes:
            raise ValueError(
                f"{data.name}: labels must lie in 0..{data.num_classes - 1}, got {labels.min()}..{labels.max()}"
            )
        self.images, self.labels, self.flip, self.identity = (
            images,
            labels,
            data.flip,
            identity or {},
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(
        self, indices: Tensor, seed: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) float32 and labels (N,) at these indices, the same at every position of a run."""
        where = indices.numpy()
        taken = self.images[where]
        images = (
            from_uint8(torch.from_numpy(taken))
            if taken.dtype == np.uint8
            else torch.from_numpy(np.asarray(taken, dtype=np.float32))
        )
        return images, torch.from_numpy(np.asarray(self.labels[where], dtype=np.int64))


def load_data(data: Data) -> ImageSet | LatentSet:
    """The declared set: scikit-learn's bundled digits, CIFAR-10's training images, a folder of latents, or a folder of two .npy files."""
    require_data(data)
    if data.name == "digits":
        from sklearn.datasets import load_digits

        digits, factor = load_digits(), 8 // data.size
        if data.size * factor != 8:
            raise ValueError(
                f"digits have 8 x 8 pixels, or means over areas of them: size 1, 2, 4 or 8, not {data.size}"
            )
        images = digits.images.reshape(-1, 1, data.size, factor, data.size, factor).mean((3, 5))
        return ImageSet(images.astype(np.float32) / 8 - 1, digits.target, data)
    folder = folder_of(data)
    if data.name == "cifar10":
        return load_cifar10(data, "train")
    if (folder / "manifest.json").is_file():
        return LatentSet(folder, data)
    return ImageSet(
        np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), data
    )


def load_cifar10(data: Data, split: str) -> ImageSet:
    """CIFAR-10's 'train' or 'test' images; ValueError in one line where they are not there."""
    if not (found := find_cifar10(folder_of(data), split)):
        raise ValueError(
            f"CIFAR-10's {split} images are not in data/cifar10 (or $DICO_DATA/cifar10): {split}.parquet or cifar-10-batches-py"
        )
    images, labels, identity = read_cifar10(found, split)
    return ImageSet(images, labels, data, identity)


def iterate_batches(
    images: ImageSet | LatentSet,
    batch: int,
    seed: int,
    steps: range,
    device: torch.device,
    part: slice = slice(None),
    workers: int = 2,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step's batch on the device, made ahead by `workers` threads, pinned for a GPU.

    `part` is a process's share of the global batch: what stands at a place of it does not depend on who asks for it.
    """

    def make(step: int) -> tuple[Tensor, ...]:
        positions = torch.arange(step * batch, (step + 1) * batch)[part]
        made = images.take(batch_indices(len(images), batch, seed, step)[part], seed, positions)
        return tuple(tensor.pin_memory() for tensor in made) if device.type == "cuda" else made

    for x, y in prefetch(make, steps, workers, 2 * workers):
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of a step: consecutive positions of an endless sequence of per-epoch permutations."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    parts = [
        _permutation(size, seed, int(epoch))[positions[positions // size == epoch] % size]
        for epoch in (positions // size).unique()
    ]
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_at("order", seed, epoch))


# Work done ahead in threads, handed over in order. Standard library only.
Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Iterator[Result]:
    """`function` of every item, in the items' order, at most `depth` results in flight. Exceptions surface at their item."""
    with ThreadPoolExecutor(workers) as pool:
        flying: deque = deque()
        try:
            for item in items:
                flying.append(pool.submit(function, item))
                if len(flying) >= depth:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
