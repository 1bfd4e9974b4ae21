"""Draw the images of autoregressive networks, a scale a step, for any number of batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.engine.autoregressive.scales import RaceDraw, ScaleSystem, draw_scales
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.specs.spec import Sampler

NAME = "scales"  # of the only sampler of networks that predict tokens


class ScaleSampler:
    """The sampler that a spec declares for a network that predicts tokens.

    Each step runs the network once for the tokens of a scale, with the keys and values of coarser
    scales from a cache. With guidance, it sees the batch twice.
    """

    def __init__(self, sampler: Sampler) -> None:
        """Take a sampler.

        Raises:
            ValueError: it is a sampler of diffusion.
        """
        if sampler.name != NAME:
            raise ValueError(
                f"unknown sampler {sampler.name!r} of a network that predicts tokens; known: {NAME}"
            )
        self.sampler = sampler

    def sample(self, model: CountingModel, y: Tensor, seeds: list[int]) -> Tensor:
        """Sample a batch (n, C, H, W) for labels (n,), one seed for each image."""
        *_, features = self.steps(model, y, seeds)
        with torch.no_grad():
            return system_of(model).tokenizer.decode(features)

    @torch.no_grad()
    def steps(self, model: CountingModel, y: Tensor, seeds: list[int]) -> Iterator[Tensor]:
        """Yield the features (n, c, P, P) after each scale; an image is decoded of the last ones.

        Raises:
            ValueError: the sampler has another number of steps than the network has scales.
        """
        system = system_of(model)
        scales = len(system.tokenizer.sides)
        if self.sampler.num_steps != scales:
            raise ValueError(
                f"the sampler {NAME} takes one step for each of {scales} scales, and not "
                f"{self.sampler.num_steps}; declare num_steps={scales}"
            )
        rows = len(y) if self.sampler.scale == 1 else 2 * len(y)
        for drawing in draw_scales(system, self.sampler, y, RaceDraw(seeds)):
            model.count(rows)
            yield drawing.features


def system_of(model: CountingModel) -> ScaleSystem:
    """Return the networks that a model counts the images of."""
    assert isinstance(model.model, ScaleSystem), "the spec names a network that predicts tokens"
    return model.model
