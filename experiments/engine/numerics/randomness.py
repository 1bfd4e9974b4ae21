"""Randomness as a function of position, so that a restart or another number of processes changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def seed_at(*position: int | str) -> int:
    """A 63-bit seed for a position such as ("train", seed, step). Equal positions give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its position."""
    return torch.Generator(device).manual_seed(seed_at(*position))


# Noise of generated images.
class ImageNoise:
    """Standard normals; every image has a CPU stream of its own, so batching cannot change an image's noise."""

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ):
        """seeds: one an image, below 2^32 because the CPU generator drops higher bits; shape: one image's (C, H, W)."""
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"seeds lie in 0..2^32-1, these span {min(seeds)}..{max(seeds)}")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = torch.device(device)
        self._ahead = ThreadPoolExecutor(1) if self.device.type == "cuda" else None
        self._next = self._ahead.submit(self._drawn) if self._ahead else None

    def draw(self) -> Tensor:
        """The next normals of every image, float32 (N,C,H,W) on the device; for a GPU drawn and pinned while it computes."""
        if self._ahead is None:
            return self._drawn()
        drawn, self._next = self._next.result(), self._ahead.submit(self._drawn)
        return drawn.to(self.device, non_blocking=True)

    def _drawn(self) -> Tensor:
        drawn = torch.empty(len(self.generators), *self.shape, pin_memory=self._ahead is not None)
        for image, generator in zip(drawn, self.generators, strict=True):
            image.normal_(generator=generator)
        return drawn
