"""Measure the loader of latents alone, over a temporary folder of random moments."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from experiments.engine.benchmarks.spec import Loader
from experiments.engine.data.latents import LatentSet, shard_path
from experiments.engine.data.sets import iterate_batches
from experiments.engine.jobs.pool import available_cores
from experiments.engine.numerics.device import describe_device
from experiments.engine.numerics.precision import read_tf32_flags
from experiments.engine.records.store import Store, provenance
from experiments.engine.specs.spec import Data

RUNS = 7
STEPS = 40
NUM_CLASSES = 1000
NUM_SHARDS, SHARD_SIZE = 8, 512
# The loader draws in two threads.
THREADS = 2
CPU = torch.device("cpu")


def measure_loader(spec: Loader, store: Store) -> None:
    """Measure latents per second from a warm page cache, print and record them."""
    about = provenance() | describe_device("cpu")
    about |= {
        "precision_flags": read_tf32_flags(),
        "threads": THREADS,
        "cores": available_cores(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_moments(folder, spec.size)
        data = Data(
            "latents", size=spec.size, channels=4, num_classes=NUM_CLASSES, flip=True, vae="none"
        )
        images = LatentSet(folder, data)

        # Read everything once, so that all pages are in memory.
        _read_batches(images, spec.batch, 0, len(images) // spec.batch)

        # Measure rates by the wall clock, and the cores' time by the process's.
        rates = []
        cpu_started = time.process_time()
        for seed in range(RUNS):
            started = time.perf_counter()
            _read_batches(images, spec.batch, seed, STEPS)
            rates.append(STEPS * spec.batch / (time.perf_counter() - started))
        core_seconds = (time.process_time() - cpu_started) / (RUNS * STEPS * spec.batch)

    rate = statistics.median(rates)
    values = {
        "latents_per_s": rate,
        "least": min(rates),
        "most": max(rates),
        "runs": RUNS,
        "core_s_each": core_seconds,
    }
    store.append(spec, "done", values, about)
    print(
        f"latents: {rate:,.0f} per second "
        f"({min(rates):,.0f} to {max(rates):,.0f} over {RUNS} runs), "
        f"{1e6 * core_seconds:.0f} us of a core per latent; "
        f"batch {spec.batch}, {THREADS} threads, {available_cores()} cores"
    )


def _read_batches(images: LatentSet, batch: int, seed: int, steps: int) -> None:
    for _ in iterate_batches(images, batch, seed, range(steps), CPU):
        pass


def _write_moments(folder: Path, size: int) -> None:
    """Write a set of random moments, with the manifest that the loader reads."""
    draw = np.random.default_rng(0)
    shape = (2, 8, size, size)
    for number in range(NUM_SHARDS):
        np.save(shard_path(folder, number), draw.random((SHARD_SIZE, *shape), np.float32))
    np.save(folder / "labels.npy", draw.integers(0, NUM_CLASSES, NUM_SHARDS * SHARD_SIZE))

    # The manifest says what the loader checks.
    manifest = {
        "latents": "moments",
        "shape": shape,
        "num_classes": NUM_CLASSES,
        "shards": [SHARD_SIZE] * NUM_SHARDS,
        "sha256": "",
        "vae": {"name": "none", "encoder": "none"},
        "statistics": {"as_expected": False},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
