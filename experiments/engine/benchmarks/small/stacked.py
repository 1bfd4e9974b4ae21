"""Train seeds of small networks as one stacked network and one by one, in turn."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.engine.benchmarks.small.against import WARM_UP_STEPS, Rounds, append_ratios
from experiments.engine.benchmarks.spec import StackedTrainings
from experiments.engine.data.sets import ImageSet, iterate_batches
from experiments.engine.numerics.device import keep_memory
from experiments.engine.numerics.stacked import Stack
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Data, Train
from experiments.engine.specs.stages import Protocol, train_stage
from experiments.engine.timing.clock import half_interquartile_range
from experiments.engine.training.optimiser import MovingAverage, build_optimizer, lr_at
from experiments.engine.training.trainer import Trainer

CPU = torch.device("cpu")
NUM_IMAGES = 1797


class StackedTraining:
    """Trainings that differ in their seeds alone, with one stacked network and one optimiser."""

    def __init__(self, trainings: Sequence[Train], images: ImageSet) -> None:
        """Begin with the weights and the draws of every training.

        Raises:
            ValueError: the networks differ in architecture, or the recipe clips gradients.
        """
        self.recipe = recipe = trainings[0].recipe
        if recipe.grad_clip is not None:
            raise ValueError("a stack has no norm of one member's gradient: leave out grad_clip")
        self.trainers = [Trainer(training) for training in trainings]
        self.stack = Stack([trainer.model for trainer in self.trainers])
        average = copy.deepcopy(self.stack).requires_grad_(False)
        self.optimizer = build_optimizer(self.stack, recipe, is_sharded=False)
        self.average = MovingAverage(average, self.stack, recipe.ema)
        self.steps = 0
        self.flips = images.flip
        steps = range(recipe.steps)
        self.batches = [
            iterate_batches(images, recipe.batch, training.seed, steps, CPU, slice(recipe.batch))
            for training in trainings
        ]

    def step(self) -> Tensor:
        """Make a step of every member, and return their mean losses, (M,)."""
        drawn = [
            trainer.draw(self.steps, *next(batches), self.flips, slice(None))
            for trainer, batches in zip(self.trainers, self.batches, strict=True)
        ]
        inputs = (torch.cat(values) for values in zip(*drawn, strict=True))
        self.optimizer.zero_grad()
        losses, _ = self.trainers[0].losses(self.stack, *inputs)

        # The sum over members gives each the gradient of its own mean.
        (losses.sum() / self.recipe.batch).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.recipe, self.steps)
        self.optimizer.step()
        self.average.update()
        self.steps += 1
        return losses.detach().unflatten(0, (self.stack.members, -1)).mean(1)


def measure_stacked(
    rows: Sequence[Row], protocol: Protocol, members: int, rounds: Rounds, store: Store
) -> None:
    """Compare stacked trainings of rows with single ones, print and record the ratios."""
    data = protocol.data
    labels = tuple(row.label for row in rows)
    spec = StackedTrainings(members, data.size, data.channels, protocol.recipe.batch, labels)
    torch.set_num_threads(1)
    keep_memory()

    measured = {}
    for row in rows:
        seeds = [train_stage(row, protocol, seed) for seed in range(members)]
        values = compare_stacked(seeds, draw_noise(data), rounds)
        measured[row.label] = values
        print(
            f"{data.size}x{data.size}x{data.channels} {row.label}: {members} stacked seeds train "
            f"{values['ratio']:.3f} ±{values['spread']:.3f} times as many samples a core-second, "
            f"weights apart by {values['difference']:.0e}",
            flush=True,
        )

    append_ratios(spec, measured, rounds, store)


def draw_noise(data: Data) -> ImageSet:
    """Return as many images of noise as there are digits."""
    draw = np.random.default_rng(0)
    shape = (NUM_IMAGES, data.channels, data.size, data.size)
    labels = draw.integers(0, data.num_classes, NUM_IMAGES)
    return ImageSet(draw.uniform(-1, 1, shape).astype(np.float32), labels, data)


def compare_stacked(
    trainings: Sequence[Train], images: ImageSet, rounds: Rounds
) -> dict[str, float]:
    """Train a stack and its members alone in turn; return the ratio of their rates by round.

    `difference` is the largest relative one of a member's weights after the steps of the warm-up.
    """
    stacked = StackedTraining(trainings, images)
    trainers = [Trainer(training) for training in trainings]
    losses = [trainer.steps(images) for trainer in trainers]

    def run_alone() -> None:
        for each in losses:
            next(each)

    # PyTorch warns of operators that it maps one by one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        for _ in range(WARM_UP_STEPS):
            run_alone()
            stacked.step()
        difference = max(
            _difference(stacked.stack.weights_of(member), dict(trainer.model.named_parameters()))
            for member, trainer in enumerate(trainers)
        )
        seconds = [
            (_time(run_alone, rounds.steps), _time(stacked.step, rounds.steps))
            for _ in range(rounds.number)
        ]

    ratios = [alone / together for alone, together in seconds]
    samples = len(trainings) * rounds.steps * trainings[0].recipe.batch
    return {
        "samples_per_core_s": samples / statistics.median(alone for alone, _ in seconds),
        "stacked_samples_per_core_s": samples / statistics.median(both for _, both in seconds),
        "ratio": statistics.median(ratios),
        "spread": half_interquartile_range(ratios),
        "difference": difference,
    }


def _time(step: Callable[[], Any], steps: int) -> float:
    """Return the CPU seconds of some steps."""
    started = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - started


def _difference(ours: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight, in units of the largest weight of its tensor."""
    return max(
        ((ours[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-12)).item()
        for name, weight in alone.items()
    )
