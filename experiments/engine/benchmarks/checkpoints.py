"""Measure how long training stalls for a checkpoint that is written in the background."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

from experiments.engine.benchmarks.spec import Stall
from experiments.engine.data.sets import ImageSet
from experiments.engine.numerics.device import describe_device
from experiments.engine.numerics.precision import read_tf32_flags
from experiments.engine.records.store import Store, provenance
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Data, Recipe, Train
from experiments.engine.timing.clock import time_call
from experiments.engine.training.checkpoint import Writer
from experiments.engine.training.trainer import Trainer

# Steps without a save, whose median is the usual time.
PLAIN_STEPS = 14
DATA = Data("random", 32, 4, 1000)


def measure_stall(spec: Stall, store: Store) -> None:
    """Time training steps before and during a save, print and record the stall."""
    about = provenance() | describe_device(spec.device)
    about["precision_flags"] = read_tf32_flags()

    device = torch.device(spec.device)
    recipe = Recipe(steps=10**6, batch=spec.batch)
    trainer = Trainer(Train(spec.backbone, DATA, recipe), Resources(spec.device, watch_every=0))
    steps = trainer.steps(_draw_images())
    assert isinstance(steps, Generator)

    def step() -> None:
        next(steps).item()

    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder)) as writer:

        def save() -> None:
            writer.save(trainer.step, trainer.state())

        # The first save makes the buffers.
        step()
        save()
        writer.wait()

        # Time steps without a save, the copy, and steps beside the writing.
        usual = statistics.median(time_call(step, device) for _ in range(PLAIN_STEPS))
        copying = time_call(save, device)
        during = []
        while writer.busy:
            during.append(time_call(step, device))
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    steps.close()

    # Training stalls for the copy, and for what the writing slows.
    slowed = sum(during) - usual * len(during)
    stall = (copying + slowed) / (spec.every * usual)
    values = {
        "bytes": size,
        "seconds_copying": copying,
        "seconds_writing": sum(during),
        "steps_beside": len(during),
        "seconds_slowed": slowed,
        "seconds_per_step": usual,
        "stall": stall,
    }
    store.append(spec, "done", values, about)
    print(
        f"checkpoint of {size / 1e9:.2f} GB: copied in {copying:.2f} s, "
        f"written in {copying + sum(during):.1f} s beside {len(during)} steps, "
        f"which took {slowed:.2f} s longer"
    )
    print(f"stall every {spec.every} steps of {usual:.3f} s: {stall:.3%}")


def _draw_images() -> ImageSet:
    draw = np.random.default_rng(0)
    shape = (512, DATA.channels, DATA.size, DATA.size)
    pixels = draw.standard_normal(shape, dtype=np.float32)
    return ImageSet(pixels, draw.integers(DATA.num_classes, size=len(pixels)), DATA)
