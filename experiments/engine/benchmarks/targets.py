"""What this suite asks of its own speed, and by how much a measurement misses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.engine.benchmarks.spec import Kernel, Steps

# Fields of a record of steps. The ratios also name what is printed.
THEIRS_TO_OURS = "theirs / ours"
THEIRS_TO_PLAIN = "theirs / plain"
OVERHEAD = "overhead, ours / bare"
MATMUL_SHARE = "share_of_matmul"


@dataclass(frozen=True)
class Targets:
    """What is asked of the suite's steps and kernels."""

    # By task, device and numeric mode: how many times as long as ours the other step takes.
    times_as_fast: Mapping[tuple[str, str, str], float]
    # By network: share of the device's matrix product in bf16 training on a GPU.
    matmul_share: Mapping[str, float]
    # How many times as long as the bare step our step takes at most.
    most_overhead: float
    # By operation and implementation: share of a copy's bandwidth.
    copy_share: Mapping[tuple[str, str], float]


def judge_steps(
    spec: Steps, values: Mapping[str, Any], targets: Targets
) -> dict[str, dict[str, float]]:
    """Compare measured values with their targets.

    Returns:
        `asked`: the targets of the values that were measured.
        `missed`: for those that miss it, by what share of the target.
    """
    # Find the targets of this task, device and numeric mode.
    candidates = {
        THEIRS_TO_OURS: targets.times_as_fast.get((spec.what, spec.device, spec.precision)),
        OVERHEAD: targets.most_overhead,
    }
    if (spec.device, spec.precision) == ("cuda", "bf16"):
        candidates[MATMUL_SHARE] = targets.matmul_share.get(spec.network)
    asked = {
        label: target
        for label, target in candidates.items()
        if target is not None and label in values
    }

    # The overhead must stay below its target, the other values must reach theirs.
    missed = {}
    for label, target in asked.items():
        excess = values[label] / target - 1
        shortfall = excess if label == OVERHEAD else -excess
        if shortfall > 0:
            missed[label] = shortfall
    return {"asked": asked, "missed": missed}


def describe_copy_share(spec: Kernel, share: float, targets: Targets) -> str:
    """Say whether a kernel reaches the share of a copy's bandwidth that is asked of it."""
    target = targets.copy_share.get((spec.op, spec.choice))
    if target is None:
        return ""
    verb = "reaches" if share >= target else "misses"
    return f", {verb} the {100 * target:.0f} % asked of it"
