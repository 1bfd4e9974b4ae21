"""Latents on disk: memory-mapped shards of posterior moments or of fixed samples.

`encode.py` writes them. A folder holds manifest.json, labels.npy (M,) and shard-<number>.npy, each
float32 (n, 2, K, h, w): an image and its flip. K is 2C for moments, which are means, then
deviations, unscaled. K is C for samples, which are as a network sees them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.engine.data.autoencoders.spaces import normalise
from experiments.engine.data.checks import (
    check_latents,
    check_number,
    identify_classes,
    open_array,
)
from experiments.engine.data.locate import read_manifest
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.specs.latent_space import SD_SPACE, LatentSpace, space_of
from experiments.engine.specs.spec import Data

SCALE = SD_SPACE.scale[0]


class LatentSet:
    """Latents (M, C, h, w) with labels (M,).

    What a visit sees is a function of its position in the run's sequence alone.

    flip: always False: the encoder has seen flipped images, and nobody may mirror a latent.
    identity: what identifies the latents in records.
    """

    flip = False

    def __init__(self, folder: Path, data: Data) -> None:
        self.manifest = manifest = read_manifest(folder, data)
        self.data = data
        self.space = space_of(data)
        self.identity: dict[str, Any] = {"data_sha256": manifest["sha256"], "vae": manifest["vae"]}
        self.identity |= identify_classes(folder, data.num_classes)

        # Index of the first image of every shard, and their number at the end.
        self.starts = np.cumsum([0, *manifest["shards"]])
        _check_count(folder, manifest, int(self.starts[-1]))
        self.labels = _open_array(folder / "labels.npy", (int(self.starts[-1]),), np.int64)
        _check_labels(folder, self.labels, data.num_classes)
        self.identity |= check_number(data, self.labels)

        # What was measured of a shard is kept beside it, so that only the first load reads all.
        channels = 2 * data.channels if data.latents == "moments" else data.channels
        rows = (2, channels, data.size, data.size)
        self.shards = [
            _open_array(shard_path(folder, number), (int(end - start), *rows), np.float32)
            for number, (start, end) in enumerate(pairwise(self.starts))
        ]
        for number, shard in enumerate(self.shards):
            check_latents(shard_path(folder, number), shard, data.latents)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Read latents (N, C, h, w) float32 and labels (N,) at these indices.

        Flip and posterior noise come from (seed, position).
        """
        rows = indices.numpy()
        latents = torch.empty(len(rows), self.data.channels, self.data.size, self.data.size)
        generator = torch.Generator()
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for latent, number, row, position in zip(
            latents, numbers, rows - self.starts[numbers], positions.tolist(), strict=True
        ):
            # The flip is a bit that the generator of the noise does not read: it takes 32.
            draw = seed_at("latent", seed, position)
            flipped = draw >> 48 & 1 if self.data.flip else 0
            stored = self.shards[number][row, flipped]
            if self.data.latents == "moments":
                latent.normal_(generator=generator.manual_seed(draw))
                self._scale_noise(latent.numpy(), stored)
            else:
                latent.numpy()[:] = stored
        return latents, torch.from_numpy(self.labels[rows])

    def _scale_noise(self, noise: np.ndarray, moments: np.ndarray) -> None:
        """Turn standard normals (C, h, w) into a scaled sample of the posterior, in place."""
        channels = self.data.channels
        noise *= moments[channels:]
        noise += moments[:channels]
        normalise(noise, self.space)


def draw_fixed(moments: np.ndarray, index: int, space: LatentSpace | None) -> np.ndarray:
    """Sample the posteriors of a picture and of its flip: (2, C, h, w), as a network sees them.

    The noise comes from the picture's place in the listing.
    """
    assert space is not None, "fixed samples need a scale"
    mean, deviation = np.split(moments, 2, axis=1)
    noise = torch.randn(mean.shape, generator=generator_at("fixed latent", index)).numpy()
    latents: np.ndarray = mean + deviation * noise
    normalise(latents, space)
    return latents


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{number:05d}.npy"


def _check_count(folder: Path, manifest: dict[str, Any], num: int) -> None:
    """Raise ValueError unless the shards of a manifest add up to the number that it declares."""
    declared = manifest.get("num_images", num)
    if declared != num:
        raise ValueError(
            f"{folder / 'manifest.json'} declares {declared} images, and its shards hold {num}; "
            "prepare the latents again"
        )


def _check_labels(folder: Path, labels: np.ndarray, num_classes: int) -> None:
    """Raise ValueError unless labels name classes of the set."""
    if labels.size and labels.min() >= 0 and labels.max() < max(1, num_classes):
        return
    there = f"{labels.min()}..{labels.max()}" if labels.size else "none"
    raise ValueError(
        f"{folder / 'labels.npy'}: labels must lie in 0..{num_classes - 1}, got {there}; "
        "prepare the latents again"
    )


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Open a memory-mapped array; ValueError if it is damaged or of another shape or type."""
    # As a plain array, because slices of a memmap are slow.
    stored = np.asarray(open_array(path, "remove it and prepare the latents again"))
    if stored.shape != shape or stored.dtype != dtype:
        raise ValueError(
            f"{path} holds {stored.dtype} {stored.shape} where {np.dtype(dtype)} {shape} belongs; "
            "remove it and prepare the latents again"
        )
    return stored
