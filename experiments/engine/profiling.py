"""Where the time of a timed task goes: seconds, multiply-accumulates and bytes of every class of operator, and a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backbones import kernels
from experiments.engine import timed_tasks, timing
from experiments.engine.operators import Operators
from experiments.engine.precision import flags, precision
from experiments.engine.spec import Cost, Profile

WARM_UP = 3


def run(spec: Profile, folder: Path) -> dict[str, Any]:
    """Seconds of a call as a whole, and of its operators one by one, by class; the trace goes to `trace.json.gz` in the folder.

    An operator is timed alone, between two synchronisations, so their sum is more than the call takes; what a call spends
    between operators (Python, launches, kernels outside PyTorch's operators) cannot be told from it and is not shown.
    """
    timed = spec.timing
    device = torch.device(timed.device)
    network = Cost(timed.backbone, timed.size, timed.channels, timed.num_classes)
    with precision(timed.precision, device), kernels.use(**timed.kernels):
        timing.check(network, timed, device)
        kernels.reset_used()
        task = timed_tasks.task(network, timed, device)
        for _ in range(WARM_UP):
            task()
        whole = sorted(timing.seconds(task, device) for _ in range(WARM_UP))[WARM_UP // 2]
        with Operators(device) as operators:
            task()
        in_force = flags()
        folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU] + [
            torch.profiler.ProfilerActivity.CUDA
        ] * (device.type == "cuda")
        with torch.profiler.profile(activities=activities) as trace:
            task()
        trace.export_chrome_trace(str(folder / "trace.json.gz"))
    return {"seconds": whole, "classes": operators.classes, "trace": "trace.json.gz", **in_force}
