"""How long a sampling will take, said after its first steps if it is long."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from torch import Tensor

from experiments.engine.runtime.group import Group
from experiments.engine.specs.spec import Sampler

LONG = 3600.0  # seconds from which on a sampling is long
# The step after which the clock starts, and the one after which it is read. What comes before is
# no measure: the first step may compile the network or choose its kernels.
STARTED, READ = 1, 2

Watch = Callable[[Tensor], None]  # hears x (N, C, H, W) after each step of the sampler


def ignore_step(x: Tensor) -> None:
    """Do nothing: the watch of a sampling whose time nobody asks for."""


class Forecast:
    """Watches the first steps, and says on standard error how long all of them take."""

    def __init__(self, steps: int, num: int) -> None:
        """Watch `steps` steps of this process, in which `num` images are drawn."""
        self.steps = steps
        self.num = num
        self.seen = 0
        self.started = 0.0

    def __call__(self, x: Tensor) -> None:
        self.seen += 1
        if self.seen not in (STARTED, READ):
            return

        # Reading a number waits for the device.
        x.flatten()[0].item()
        if self.seen == STARTED:
            self.started = time.perf_counter()
            return
        seconds = (time.perf_counter() - self.started) / (READ - STARTED) * self.steps
        if seconds >= LONG:
            print(
                f"sampling: about {seconds / 3600:,.1f} h for {self.num} images, judged by one "
                "step; decoding and scores come on top",
                file=sys.stderr,
                flush=True,
            )


def watch_sampling(sampler: Sampler, num: int, batch: int, group: Group) -> Watch:
    """Return what the first rank watches the steps with; dopri5 takes as many as it needs.

    Args:
        sampler: of the network, or of a system's base model.
        num: images that are still to be drawn, by all ranks together.
        batch: images at a time in each process.
        group: the ranks.
    """
    if not group.first or sampler.name == "dopri5":
        return ignore_step
    return Forecast(sampler.num_steps * math.ceil(num / batch / group.world_size), num)
