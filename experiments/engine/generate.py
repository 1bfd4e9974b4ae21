"""Sampling: every image from its own seed, whatever the batch size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.engine import preemption
from experiments.engine.diffusion import Model
from experiments.engine.noise import ImageNoise
from experiments.engine.precision import precision
from experiments.engine.process import process
from experiments.engine.randomness import seed_at
from experiments.engine.samplers import Guided, bind
from experiments.engine.spec import Evaluate


class Counted:
    """A network that counts the images it is given; over the images sampled, that is evaluations per image (NFE).

    Raises Preempted where the job is asked to stop: a piece of work is many evaluations.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.evaluated = model, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if how := preemption.asked():
            raise preemption.Preempted(how)
        self.evaluated += len(x)
        return self.model(x, t, y)


def labels(policy: str, num: int, num_classes: int, seed: int) -> Tensor:
    """Labels (num,) of the images: 'balanced' cycles through the classes, 'random' draws each from (seed, index)."""
    if policy == "balanced":
        return torch.arange(num) % num_classes
    if policy == "random":
        return torch.tensor([seed_at("label", seed, index) % num_classes for index in range(num)])
    raise ValueError(f"unknown label policy {policy!r}; known: balanced, random")


def image_seeds(seed: int, num: int) -> list[int]:
    """One seed an image, all different: the CPU generator reads 32 bits."""
    base = seed_at("image", seed)
    return [(base + index) % 2**32 for index in range(num)]


def images(spec: Evaluate, model: Model, device: torch.device, batch: int, within: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Sampled images (n, C, H, W) and their labels (n,), `batch` at a time, in order of their index; `within` limits the indices."""
    data, sampler = spec.train.data, spec.sampler
    sample = bind(sampler, process(spec.train.diffusion).to(device))
    network = Guided(model, sampler.scale, data.num_classes, channels=sampler.channels, interval=sampler.interval)
    y, seeds = labels(spec.labels, spec.num, data.num_classes, spec.seed), image_seeds(spec.seed, spec.num)
    within = within or range(spec.num)
    for start in range(within.start, within.stop, batch):
        part = slice(start, min(start + batch, within.stop))
        noise = ImageNoise(seeds[part], (data.channels, data.size, data.size), device)
        with precision(spec.precision, device):
            for x in sample(network, y[part].to(device), noise):
                pass
        yield x.cpu(), y[part]
