"""Latents on disk: memory-mapped shards of posterior moments or fixed samples, as `shards.py` writes them.

A folder holds manifest.json, labels.npy (M,) and shard-<number>.npy, each float32 (n, 2, K, h, w): the image and its
flip; K is 2C for moments (means, then deviations, unscaled) and C for samples (scaled by 0.18215).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.engine.data.locate import read_manifest
from experiments.engine.numerics.randomness import seed_at
from experiments.engine.specs.spec import Data

SCALE = 0.18215


class LatentSet:
    """Latents (M, C, h, w) with labels (M,). What a visit sees is a function of its position in the run's sequence alone."""

    flip = False  # the encoder has seen the flipped images; nobody downstream may mirror a latent

    def __init__(self, folder: Path, data: Data) -> None:
        manifest = read_manifest(folder, data)
        self.data = data
        self.identity: dict[str, Any] = {"data_sha256": manifest["sha256"], "vae": manifest["vae"]}
        self.starts = np.cumsum([0, *manifest["shards"]])
        self.labels = _opened(folder / "labels.npy", (int(self.starts[-1]),), np.int64)
        rows = (2, data.channels * (2 if data.latents == "moments" else 1), data.size, data.size)
        self.shards = [
            _opened(shard_path(folder, number), (int(b - a), *rows), np.float32)
            for number, (a, b) in enumerate(pairwise(self.starts))
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (N, C, h, w) float32 and labels (N,) at these indices; flip and posterior noise come from (seed, position)."""
        channels, moments = self.data.channels, self.data.latents == "moments"
        latents = torch.empty(len(indices), channels, self.data.size, self.data.size)
        noise, where = torch.Generator(), indices.numpy()
        numbers = np.searchsorted(self.starts, where, side="right") - 1
        for out, number, row, position in zip(
            latents, numbers, where - self.starts[numbers], positions.tolist(), strict=True
        ):
            draw = seed_at("latent", seed, position)
            flipped = (
                draw >> 48 & 1 if self.data.flip else 0
            )  # a bit that the noise's generator does not read: it takes 32
            stored, filled = self.shards[number][row, flipped], out.numpy()
            if moments:
                out.normal_(generator=noise.manual_seed(draw))
                filled *= stored[channels:]
                filled += stored[:channels]
                filled *= np.float32(SCALE)
            else:
                filled[:] = stored
        return latents, torch.from_numpy(self.labels[where])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _opened(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        stored = np.asarray(
            np.load(path, mmap_mode="r", allow_pickle=False)
        )  # as a plain array: a memmap's slices are slow
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it and prepare the latents again"
        ) from None
    if stored.shape != shape or stored.dtype != dtype:
        raise ValueError(
            f"{path} holds {stored.dtype} {stored.shape} where {np.dtype(dtype)} {shape} belongs; remove it and prepare the latents again"
        )
    return stored
