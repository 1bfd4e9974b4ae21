"""Where the time of a timed task goes, by class of operator, and a trace for a viewer."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from backbones import kernels
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.specs.spec import Cost, Profile
from experiments.engine.timing.check import check_against_reference
from experiments.engine.timing.clock import time_call
from experiments.engine.timing.operators import Operators
from experiments.engine.timing.tasks import Task, build_task

RUNS = 3
TRACE = "trace.json.gz"


def profile_task(spec: Profile, folder: Path) -> dict[str, Any]:
    """Measure one call of a task, and each of its operators alone; write a trace to the folder.

    An operator is timed between two synchronisations, so the operators' sum exceeds the call's
    time. What a call spends between operators (Python, launches, kernels outside PyTorch's
    operators) cannot be separated from that and is not shown. Passes in C, which no operator shows,
    give way to their references.
    """
    timing = spec.timing
    device = torch.device(timing.device)
    network = Cost(
        timing.backbone, timing.size, timing.channels, timing.num_classes, timing.tokenizer
    )
    shown = kernels.references(instead_of="rows") | timing.kernels
    with precision(timing.precision, device), kernels.use(**shown):
        # Refuse what is wrong, and let the record name the kernels of the task, not of the check.
        check_against_reference(network, timing, device)
        kernels.reset_used()
        task = build_task(network, timing, device)

        # Time the whole call first, warm, then its operators.
        for _ in range(RUNS):
            task()
        seconds = statistics.median(time_call(task, device) for _ in range(RUNS))
        with Operators(device) as operators:
            task()

        tf32_flags = read_tf32_flags()
        _write_trace(task, device, folder)
    return {"seconds": seconds, "classes": operators.classes, "trace": TRACE, **tf32_flags}


def _write_trace(task: Task, device: torch.device, folder: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        task()
    folder.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(folder / TRACE))
