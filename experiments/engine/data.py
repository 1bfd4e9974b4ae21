"""Labelled sets and the order in which a run sees them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from experiments.engine.randomness import generator_at
from experiments.engine.sources import ROOT, require_data
from experiments.engine.spec import Data

class ImageSet:
    """Images (M, C, H, W), latents or pixels in [-1, 1], and labels (M,), in memory or memory-mapped."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, data: Data) -> None:
        if images.shape[1:] != (data.channels, data.size, data.size) or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"{data.name}: expected images (M, {data.channels}, {data.size}, {data.size}) and labels (M,), got {images.shape} and {labels.shape}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{data.name}: labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= data.num_classes:
            raise ValueError(f"{data.name}: labels must lie in 0..{data.num_classes - 1}, got {labels.min()}..{labels.max()}")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) float32 and labels (N,) at these indices."""
        where = indices.numpy()
        images = torch.from_numpy(np.asarray(self.images[where], dtype=np.float32))
        return images, torch.from_numpy(np.asarray(self.labels[where], dtype=np.int64))


def load(data: Data) -> ImageSet:
    """The declared set: scikit-learn's bundled digits, or a folder of two .npy files."""
    require_data(data)
    if data.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return ImageSet(digits.images[:, None].astype(np.float32) / 8 - 1, digits.target, data)
    folder = ROOT / data.name
    return ImageSet(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), data)


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of a step: consecutive positions of an endless sequence of per-epoch permutations."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    parts = [_permutation(size, seed, int(epoch))[positions[positions // size == epoch] % size] for epoch in (positions // size).unique()]
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_at("order", seed, epoch))
