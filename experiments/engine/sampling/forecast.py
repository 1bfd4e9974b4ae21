"""How long a sampling will take, said before its first image if it is long."""

from __future__ import annotations

import sys
import time

import torch

from experiments.engine.numerics.precision import precision
from experiments.engine.runtime.group import Group
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import Network, base_sampler, image_seeds, labels_of
from experiments.engine.sampling.scales import ScaleSampler
from experiments.engine.specs.spec import Evaluate

LONG = 3600.0  # seconds from which on a sampling is long
FEW = 4  # images by whose steps a CPU's time is judged


def announce_sampling(
    spec: Evaluate, network: Network, left: int, batch: int, device: torch.device, group: Group
) -> None:
    """Say on standard error how long the images take that are left, if it is an hour or more.

    The first rank times a step of some images that it then forgets. The time for dopri5 is that of
    one step, as nobody knows how many it will take.

    Args:
        spec: what is sampled, and how.
        network: the network or system that the spec names.
        left: images that are still to be drawn, by all ranks together.
        batch: images at a time in each process.
        device: where the network is.
        group: the ranks.
    """
    if not group.first or left == 0:
        return

    # A CPU's time grows with the images. A GPU's does not, so it is given a whole batch.
    num = min(left, batch if device.type == "cuda" else FEW)
    seconds = _time_step(spec, network, num, device)
    if seconds is None:
        return
    hours = seconds * left / num / group.world_size / 3600

    # Neither the decoder nor an upsampler is part of the step.
    if spec.sampler.name == "dopri5":
        time_needed = f"about {hours:,.1f} h for each of dopri5's steps, with {left} images"
        is_long = 3600 * hours >= LONG / 10
    else:
        hours *= spec.sampler.num_steps
        time_needed = f"about {hours:,.1f} h for {left} images"
        is_long = 3600 * hours >= LONG
    if is_long:
        print(
            f"sampling: {time_needed}, judged by one step of {num}; decoding and scores come on "
            "top",
            file=sys.stderr,
            flush=True,
        )


def _time_step(spec: Evaluate, network: Network, num: int, device: torch.device) -> float | None:
    """Return the seconds of one step for `num` images, or None if a sampler has one step alone."""
    y = labels_of(spec)[:num].to(device)
    seeds = image_seeds(spec.seed, num)
    model = CountingModel(network)
    sampler = base_sampler(spec, model, device)
    with precision(spec.precision, device):
        if isinstance(sampler, ScaleSampler):
            # Steps differ in size, so all of them are timed.
            started = time.perf_counter()
            sampler.sample(model, y, seeds).sum().item()
            return (time.perf_counter() - started) / spec.sampler.num_steps
        steps = sampler.steps(model, y, seeds)

        # The first step may compile the network or choose its kernels, so it is no measure.
        next(steps)[0].sum().item()
        started = time.perf_counter()
        x = next(steps, None)
        if x is None:
            return None
        x[0].sum().item()  # waits for the device
        return time.perf_counter() - started
