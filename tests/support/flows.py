"""Noise and helpers for tests of samplers on data whose every chain is known."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.noise import NoiseSource
from experiments.engine.diffusion.samplers import BoundSampler


class ImpulseNoise:
    """A first draw as given, in float64; of the later draws image k sees a 1 in its own alone.

    So image k of an affine chain ends on offset + gain of draw k, and an image beyond the last draw
    on the offset.
    """

    def __init__(self, first: Tensor) -> None:
        self.first = first.double()
        self.num_later_draws = -1

    def draw(self) -> Tensor:
        self.num_later_draws += 1
        if self.num_later_draws == 0:
            return self.first
        noise = torch.zeros_like(self.first)
        if self.num_later_draws < len(noise):
            noise[self.num_later_draws] = 1
        return noise


def labels(num: int) -> Tensor:
    """Labels that no test looks at, (num,)."""
    return torch.zeros(num, dtype=torch.long)


def sample(sampler: BoundSampler, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Tensor:
    """The last x of a sampler."""
    *_, x = sampler(model, y, noise)
    return x
