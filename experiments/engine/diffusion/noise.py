"""Where samplers take their noise from: seeds, one for each image, or a tensor to start from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """What samplers draw from: the first draw is where they start, later ones are steps' noise."""

    def draw(self) -> Tensor:
        """Standard normals (N,C,H,W); every call draws anew."""
        ...


class NoiseFromTensor:
    """A given start; later draws come from PyTorch's global generator of the tensor's device."""

    def __init__(self, start: Tensor) -> None:
        self.start: Tensor | None = start
        self.like = start

    def draw(self) -> Tensor:
        """Return the start once, then standard normals of its shape, type and device."""
        if self.start is None:
            return torch.randn_like(self.like)
        start = self.start
        self.start = None
        return start


def noise_source(noise: NoiseSource | Tensor) -> NoiseSource:
    """Accept a plain tensor (N,C,H,W) of initial noise where a source of noise is expected."""
    return NoiseFromTensor(noise) if isinstance(noise, Tensor) else noise
