"""The one clock of this suite, and what a fair measurement needs around it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Warm-up ends after this many runs, or earlier: once two runs in a row differ by this share.
MOST_WARM_UP_RUNS = 10
STABLE_WITHIN = 0.05
# Seconds after which a warm-up ends, or a measurement that has enough rounds.
PATIENCE = 10.0
# Seconds that one measurement should last, so that the clock's resolution does not matter.
LEAST_SECONDS = {"cuda": 0.3, "cpu": 0.05}


def time_call(
    call: Callable[[], object], device: torch.device, repeats: int = 1, synchronise: bool = True
) -> float:
    """Measure how long a call takes, from an idle device to an idle device.

    This is the only function of the suite that times work on a device.

    Args:
        call: the work; its result is ignored.
        device: a GPU is synchronised before the clock starts and before it stops.
        repeats: calls in a row; on a GPU their launches overlap with earlier work, as in use.
        synchronise: False stops the clock once everything is launched, as the paper's script does.

    Returns:
        Seconds of one call: the mean over the repeats.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()

    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if on_gpu and synchronise:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def half_interquartile_range(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles: the spread beside every median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up of a task showed."""

    # Calls that one measurement should hold, so that it lasts long enough for the clock.
    repeats: int
    # Whether two runs in a row took the same time before patience ended.
    stable: bool
    # The most memory that was allocated on the GPU; None on a CPU.
    peak_bytes: int | None


def warm_up(call: Callable[[], object], device: torch.device, captured: bool) -> WarmUp:
    """Run a task until its time is stable.

    The first run tries convolutions, so its memory is left out of the peak. The memory of a
    captured graph is allocated in the first run, so there it counts.
    """
    latest = math.inf
    stable = False
    started = time.perf_counter()
    for i in range(MOST_WARM_UP_RUNS):
        if i == 1 and not captured:
            reset_peak_memory(device)
        before = latest
        latest = time_call(call, device)
        stable = abs(latest - before) <= STABLE_WITHIN * latest
        if stable or time.perf_counter() - started > PATIENCE:
            break

    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    repeats = max(1, math.ceil(LEAST_SECONDS[device.type] / latest))
    return WarmUp(repeats, stable, peak_bytes)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak of allocated memory on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free_memory(device: torch.device) -> None:
    """Forget compiled code, and free the memory of earlier tasks on a GPU.

    The compiler runs a function eagerly once it has compiled more than eight versions of it.
    Graphs and their owners refer to each other, so only the garbage collector frees them.
    """
    torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
