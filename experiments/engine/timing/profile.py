"""Where the time of a timed task goes: seconds, multiply-accumulates and bytes of every class of operator, and a trace."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backbones import kernels
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.specs.spec import Ceilings, Cost, Profile
from experiments.engine.timing import stage as timing
from experiments.engine.timing import tasks as timed_tasks
from experiments.engine.timing.operators import Operators
from experiments.engine.timing.stage import half_interquartile_range, time_call

WARM_UP = 3


def profile_task(spec: Profile, folder: Path) -> dict[str, Any]:
    """Seconds of a call as a whole, and of its operators one by one, by class; the trace goes to `trace.json.gz` in the folder.

    An operator is timed alone, between two synchronisations, so their sum is more than the call takes; what a call spends
    between operators (Python, launches, kernels outside PyTorch's operators) cannot be told from it and is not shown.
    """
    timed = spec.timing
    device = torch.device(timed.device)
    network = Cost(timed.backbone, timed.size, timed.channels, timed.num_classes)
    with precision(timed.precision, device), kernels.use(**timed.kernels):
        timing.check_against_reference(network, timed, device)
        kernels.reset_used()
        task = timed_tasks.build_task(network, timed, device)
        for _ in range(WARM_UP):
            task()
        whole = sorted(timing.time_call(task, device) for _ in range(WARM_UP))[WARM_UP // 2]
        with Operators(device) as operators:
            task()
        in_force = read_tf32_flags()
        folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU] + [
            torch.profiler.ProfilerActivity.CUDA
        ] * (device.type == "cuda")
        with torch.profiler.profile(activities=activities) as trace:
            task()
        trace.export_chrome_trace(str(folder / "trace.json.gz"))
    return {"seconds": whole, "classes": operators.classes, "trace": "trace.json.gz", **in_force}


# What a device reaches at most, measured: the rate of large matrix products in a numeric mode, and of copying memory.
RUNS = 9
SIDES = {
    "cuda": (4096, 8192, 8064),
    "cpu": (1152, 1536, 2048),
}  # of square matrices; caches dislike some powers of two
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, more than any cache holds


def measure_ceilings(spec: Ceilings) -> dict[str, Any]:
    """Multiply-accumulates a second, of the best of some sizes, and bytes a second, read plus written; medians."""
    device = torch.device(spec.device)
    with torch.inference_mode(), precision(spec.precision, device):
        rates = {
            side: _rates(side**3, _product(side, spec.precision, device), device)
            for side in SIDES[device.type]
        }
        in_force = read_tf32_flags()
    copied = copy_rates(device)
    best = max(rates, key=lambda side: statistics.median(rates[side]))
    return {
        "macs_per_s": statistics.median(rates[best]),
        "macs_per_s_spread": half_interquartile_range(rates[best]),
        "side": best,
        "bytes_per_s": statistics.median(copied),
        "bytes_per_s_spread": half_interquartile_range(copied),
        **in_force,
    }


def copy_rates(device: torch.device) -> list[float]:
    """Bytes a second that a plain copy reads and writes, of every run."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return _rates(2 * source.nbytes, lambda: target.copy_(source), device)


def _product(side: int, mode: str, device: torch.device) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(device) for _ in range(2))
    if mode == "bf16":
        a, b = a.bfloat16(), b.bfloat16()  # under autocast a product would cast them every time
    return lambda: kernels.linear(a, b)


def _rates(amount: int, task: Callable[[], Any], device: torch.device) -> list[float]:
    for _ in range(3):
        task()
    repeats = 10 if device.type == "cuda" else 1
    return [amount / time_call(task, device, repeats) for _ in range(RUNS)]
