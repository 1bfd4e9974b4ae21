"""Randomness as a function of position.

A restart or another number of processes therefore changes no number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


def seed_at(*position: int | str) -> int:
    """Return a 63-bit seed for a position such as ("train", seed, step).

    The same position has the same seed on every machine.
    """
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that is seeded by its position."""
    return torch.Generator(device).manual_seed(seed_at(*position))


class ImageNoise:
    """Standard normal noise for a batch of images.

    Every image has a CPU generator of its own, so its noise does not depend on the batch.
    For a GPU, a thread draws and pins the next noise while the GPU computes.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ) -> None:
        """Prepare one generator an image.

        Args:
            seeds: one seed an image, below 2^32 because the CPU generator drops higher bits.
            shape: (C, H, W) of one image.
            device: where `draw` puts the noise.

        Raises:
            ValueError: a seed does not fit 32 bits.
        """
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError(
                f"seeds must be from 0 to 2^32 - 1, but are from {min(seeds)} to {max(seeds)}"
            )

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = torch.device(device)

        # The CPU draws the next noise while the GPU still works on this step.
        self._prefetcher: ThreadPoolExecutor | None = None
        if self.device.type == "cuda":
            self._prefetcher = ThreadPoolExecutor(1)
            self._next: Future[Tensor] = self._prefetcher.submit(self._draw_on_cpu)

    def draw(self) -> Tensor:
        """Return the next noise of every image on the device, float32 (N,C,H,W)."""
        if self._prefetcher is None:
            return self._draw_on_cpu()
        noise = self._next.result()
        self._next = self._prefetcher.submit(self._draw_on_cpu)
        return noise.to(self.device, non_blocking=True)

    def _draw_on_cpu(self) -> Tensor:
        pin_memory = self._prefetcher is not None
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=pin_memory)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise
