"""Measure how long one image takes in a single forward pass, and what memory inference needs."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from backbones import kernels
from experiments.engine.numerics.precision import precision
from experiments.engine.specs.spec import Latency, Timing
from experiments.engine.timing.check import check_against_reference
from experiments.engine.timing.clock import (
    PATIENCE,
    WarmUp,
    free_memory,
    reset_peak_memory,
    time_call,
    warm_up,
)
from experiments.engine.timing.memory.measure import measure_peak
from experiments.engine.timing.networks import list_networks
from experiments.engine.timing.stage import Launches, read_settings
from experiments.engine.timing.tasks import Task, build_task, combine_tasks

# A measurement has this many passes, or stops at the fewest once patience ends. The slowest
# twentieth of the fewest is one pass.
MOST_PASSES, FEWEST_PASSES = 200, 20


def measure_latency(spec: Latency) -> dict[str, Any]:
    """Measure single forward passes of one image, and the peak memory at both batches.

    Every pass runs from an idle device to an idle device, in the authors' mode too.

    Raises:
        ValueError: a network does not compute what the reference kernels compute.
    """
    timing = spec.timing
    single = replace(timing, batch=1)
    device = torch.device(timing.device)
    free_memory(device)
    with precision(timing.precision, device), kernels.use(**timing.kernels):
        # Check every network, and let the record name the kernels of the passes alone.
        for network in list_networks(timing):
            check_against_reference(network, single, device)
        kernels.reset_used()

        # One image at a time.
        launches = Launches.count()
        task, warm = _prepare(single, device)
        settings = read_settings(device, task) | Launches.count().since(launches)
        seconds = _time_passes(task, device)
        peak_of_one = _peak(task, warm)
        weights = task.weights_bytes

        # The full batch replaces it.
        del task
        peak_of_batch = _peak(*_prepare(timing, device))

    return {
        "latency_s": statistics.median(seconds),
        "latency_p95_s": statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        "passes": len(seconds),
        "stable": warm.stable,
        "weights_bytes": weights,
        "peak_memory_bytes_one": peak_of_one,
        "peak_memory_bytes_batch": peak_of_batch,
        **settings,
    }


def _prepare(timing: Timing, device: torch.device) -> tuple[Task, WarmUp]:
    """Build and warm up a pass through all networks, alone on its device."""
    free_memory(device)
    reset_peak_memory(device)
    task = combine_tasks([build_task(each, timing, device) for each in list_networks(timing)])
    return task, warm_up(task, device, captured=timing.graphs)


def _time_passes(task: Task, device: torch.device) -> list[float]:
    """Return the seconds of every pass."""
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < FEWEST_PASSES or (
        len(seconds) < MOST_PASSES and time.perf_counter() - started < PATIENCE
    ):
        seconds.append(time_call(task, device))
    return seconds


def _peak(task: Task, warm: WarmUp) -> int:
    """Return the most bytes of a warm pass, networks and inputs included."""
    if warm.peak_bytes is not None:
        return warm.peak_bytes
    return task.held_bytes + measure_peak(task)
