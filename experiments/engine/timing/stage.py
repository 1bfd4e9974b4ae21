"""Measure images per second of a network, or of a system of networks, beside a baseline."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

import backbones
from backbones import kernels
from experiments.engine.numerics.cuda_graphs import CudaGraph
from experiments.engine.numerics.device import read_joules
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing.check import check_against_reference
from experiments.engine.timing.clock import (
    PATIENCE,
    WarmUp,
    free_memory,
    half_interquartile_range,
    reset_peak_memory,
    time_call,
    warm_up,
)
from experiments.engine.timing.networks import list_networks
from experiments.engine.timing.operators import Operators
from experiments.engine.timing.tasks import Task, build_task, combine_tasks

# A measurement has this many rounds, or stops at the fewest once patience ends.
MOST_ROUNDS, FEWEST_ROUNDS = 7, 3

# The networks that an image passes one after the other; most systems have one.
System = tuple[Cost, ...]


@dataclass(frozen=True)
class Round:
    """One measurement of every system, in turn."""

    # Seconds of one batch, the subject first and the baseline last.
    seconds: list[float]
    # Joules of one image of the subject; None if the GPU does not tell.
    joules: float | None

    @property
    def ratio(self) -> float:
        """Return how many times as fast as the baseline the subject is."""
        return self.seconds[-1] / self.seconds[0]


def measure_speed(spec: Timing) -> dict[str, Any]:
    """Measure the subject's median images per second, and its ratio to the baseline.

    Subject and baseline run in turn. The machine's speed drifts, so the ratio is the median of
    the ratios of neighbouring runs. Peak memory is the subject's alone, because the baseline is
    built later. `stable` is false if the warm-up ended before two runs took the same time.

    Raises:
        ValueError: a network does not compute what the reference kernels compute.
    """
    device = torch.device(spec.device)
    free_memory(device)
    systems = _list_systems(spec)
    with precision(spec.precision, device), kernels.use(**spec.kernels):
        # Check every network once, and let the record name the kernels of the tasks alone.
        networks = {str(network): network for system in systems for network in system}
        for network in networks.values():
            check_against_reference(network, spec, device)
        kernels.reset_used()
        free_memory(device)

        # Build and warm up the subject first, so that its peak is its own.
        launches = Launches.count()
        tasks: list[Task] = []
        warm_ups: list[WarmUp] = []
        for system in systems:
            reset_peak_memory(device)
            tasks.append(combine_tasks([build_task(each, spec, device) for each in system]))
            warm_ups.append(warm_up(tasks[-1], device, captured=spec.graphs))

        # Read back what is in force before the clock starts.
        settings = read_settings(device, tasks[0]) | Launches.count().since(launches)
        bytes_moved = None
        if not (spec.compile or spec.graphs):
            bytes_moved = _count_bytes_moved(tasks[0], device)
        repeats = max(each.repeats for each in warm_ups)
        rounds = _measure_rounds(tasks, spec, device, repeats)

    return {
        **_summarise(rounds, spec, compared=len(systems) > 1),
        "baseline_one_condition": tasks[-1].one_condition if spec.baseline else None,
        "repeats": repeats,
        "stable": all(each.stable for each in warm_ups),
        "peak_memory_bytes": warm_ups[0].peak_bytes,
        "bytes_moved": bytes_moved,
        **settings,
    }


def _list_systems(spec: Timing) -> list[System]:
    """Return the subject and, if it differs, the baseline."""
    size, channels = spec.baseline_input or (spec.size, spec.channels)
    other = spec.baseline or spec.backbone
    is_autoregressive = backbones.kind_of(other.name) is backbones.Kind.AUTOREGRESSIVE
    tokenizer = spec.tokenizer if is_autoregressive else None
    baseline = (Cost(other, size, channels, spec.num_classes, tokenizer),)
    subject = tuple(list_networks(spec))
    return [subject] if subject == baseline else [subject, baseline]


def _measure_rounds(
    tasks: list[Task], spec: Timing, device: torch.device, repeats: int
) -> list[Round]:
    """Time all tasks in turn, until there are enough rounds or patience ends."""
    # The authors' script stops its clock at the last launch, not at the last result.
    synchronise = spec.precision != "as_published"
    rounds: list[Round] = []
    started = time.perf_counter()
    while len(rounds) < FEWEST_ROUNDS or (
        len(rounds) < MOST_ROUNDS and time.perf_counter() - started < PATIENCE
    ):
        # The energy counter covers the subject alone.
        before = read_joules(device)
        seconds = [time_call(tasks[0], device, repeats, synchronise)]
        after = read_joules(device)
        joules = None
        if before is not None and after is not None:
            joules = (after - before) / (repeats * spec.batch)

        seconds += [time_call(task, device, repeats, synchronise) for task in tasks[1:]]
        rounds.append(Round(seconds, joules))
    return rounds


def _summarise(rounds: list[Round], spec: Timing, compared: bool) -> dict[str, Any]:
    """Return medians over the rounds and their spreads, as a record's fields."""
    rates = [spec.batch / each.seconds[0] for each in rounds]
    ratios = [each.ratio for each in rounds]
    joules = [each.joules for each in rounds if each.joules is not None]

    # The last time of each round is the baseline's.
    baseline_rate = None
    if spec.baseline:
        baseline_rate = statistics.median(spec.batch / each.seconds[-1] for each in rounds)

    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_spread": half_interquartile_range(rates),
        "relative": statistics.median(ratios),
        "relative_spread": half_interquartile_range(ratios) if compared else 0.0,
        "baseline_images_per_s": baseline_rate,
        "runs": len(rounds),
        "joules_per_image": statistics.median(joules) if len(joules) == len(rounds) else None,
    }


def _count_bytes_moved(task: Task, device: torch.device) -> int:
    """Count the bytes that the operators of one run read and write.

    Compiled or captured work hides its operators, so it has no such count.
    """
    with Operators(device) as operators:
        task()
    return operators.moved


def read_settings(device: torch.device, task: Task) -> dict[str, Any]:
    """Read back the numeric flags and what the task says of its tensors."""
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    return {
        **read_tf32_flags(),
        "autocast": autocast,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "memory_format": task.memory_format,
        "one_condition": task.one_condition,
    }


@dataclass(frozen=True)
class Launches:
    """How often this process has compiled and replayed graphs so far."""

    compiled: int
    replayed: int

    @classmethod
    def count(cls) -> Launches:
        """Read the counters; without torch.compile its module is never loaded."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        compiled = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
        return cls(compiled, CudaGraph.replayed)

    def since(self, before: Launches) -> dict[str, bool]:
        """Tell whether compiled code and CUDA graphs really ran since then."""
        return {
            "compiled": self.compiled > before.compiled,
            "graphs": self.replayed > before.replayed,
        }
