"""Time training and sampling steps of this suite beside those of other loops.

Up to four steps run in turn, so that the machine's drift cancels:

    ours    the trainer or the sampler, as runs use them
    bare    our network in the shortest loop; what ours takes longer is the suite's overhead
    plain   our network in a plain loop: iDDPM's loss, PyTorch's default AdamW, EMA by parameter
    theirs  the other network in that same plain loop
"""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones import kernels
from experiments.engine.benchmarks.spec import Steps
from experiments.engine.benchmarks.targets import (
    MATMUL_SHARE,
    OVERHEAD,
    THEIRS_TO_OURS,
    THEIRS_TO_PLAIN,
    Targets,
    judge_steps,
)
from experiments.engine.jobs.execute import execute
from experiments.engine.numerics.device import describe_device
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.store import Store, provenance
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Ceilings, Cost, Timing
from experiments.engine.timing.check import check_against_reference
from experiments.engine.timing.clock import free_memory, half_interquartile_range, time_call
from experiments.engine.timing.cost import count_backbone
from experiments.engine.timing.networks import draw_network, size_backbone
from experiments.engine.timing.plain_steps import bare_training, plain_sampling, plain_training
from experiments.engine.timing.tasks import build_task

# Ratios of medians: the field of the record, then the step above and the step below the line.
RATIOS = (
    (THEIRS_TO_OURS, "theirs", "ours"),
    (THEIRS_TO_PLAIN, "theirs", "plain"),
    (OVERHEAD, "ours", "bare"),
)
# Steps of a loop of sampling, each of which costs what one of 250 does.
SAMPLING_STEPS = {"cpu": 2, "cuda": 10}
WARM_UP_RUNS = 3
# Seconds that one measurement should last on a GPU.
LEAST_SECONDS = 0.2
# Multiply-accumulates of a training step over those of a forward pass.
PASSES = 3


@dataclass(frozen=True)
class Other:
    """Another implementation: a constructor without arguments in a file."""

    file: Path
    constructor: str

    def hash(self) -> str:
        """Return the SHA-256 of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def build(self) -> nn.Module:
        """Load the file, whose imports may lie beside it, and call the constructor.

        Raises:
            ValueError: the file needs a missing package, or has no such constructor.
        """
        spec = importlib.util.spec_from_file_location(f"other_{self.file.stem}", self.file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{self.file.name} is no Python file")
        module = importlib.util.module_from_spec(spec)

        # The file's folder is on the path only while the file is imported.
        sys.path.insert(0, str(self.file.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise ValueError(
                f"{self.file.name} needs {error.name}, which is not installed"
            ) from None
        finally:
            sys.path.pop(0)

        if not hasattr(module, self.constructor):
            raise ValueError(f"{self.file.name} has no {self.constructor}")
        return getattr(module, self.constructor)()


@dataclass(frozen=True)
class Measurement:
    """A comparison that was timed."""

    # The spec, with the batch that fitted.
    spec: Steps
    # Fields of the record.
    values: dict[str, Any]
    # The kernels that ran in `ours`.
    kernels: dict[str, list[str]]


class NotTimed(Exception):
    """Why a comparison cannot be timed."""


def measure_steps(
    spec: Steps, other: Other | None, rounds: int, store: Store, targets: Targets
) -> bool:
    """Time a comparison, halving the batch until it fits; print and record it.

    Returns:
        False if nothing fits, or if `ours` computes something else than its reference.
    """
    if other:
        spec = replace(spec, other=other.hash())
    about = provenance() | describe_device(spec.device)
    name = f"{spec.network} {spec.what}, {spec.precision}, {spec.device}"
    ceiling = _measure_ceiling(spec, store) if spec.what == "training" else None
    try:
        measurement = _measure_largest_batch(spec, other, rounds, name)
    except NotTimed as reason:
        store.append(spec, "failed", {}, about, str(reason))
        print(f"{name}: not timed: {reason}", flush=True)
        return False

    # Set the step beside the device's ceiling and beside what is asked of it.
    spec, values = measurement.spec, measurement.values
    if ceiling:
        macs = PASSES * ceiling["macs_core"] * spec.batch
        share = macs / values["ours_s"] / ceiling["ceiling_macs_per_s"]
        values |= ceiling | {MATMUL_SHARE: share}
    values |= judge_steps(spec, values, targets)

    print(f"{name}, batch {spec.batch}: {_describe(values)}", flush=True)
    about["kernels"] = measurement.kernels
    about["precision_flags"] = {flag: values[flag] for flag in read_tf32_flags()}
    store.append(spec, "done", values, about)
    return True


def _measure_largest_batch(spec: Steps, other: Other | None, rounds: int, name: str) -> Measurement:
    """Measure the batch or the first half of a half of it that fits the memory.

    Raises:
        NotTimed: no batch fits, or `ours` is refused.
    """
    device = torch.device(spec.device)
    reason = "no batch"
    while spec.batch:
        free_memory(device)
        try:
            _refuse_wrong_steps(spec, device)
            return _compare(spec, other, rounds, device)
        except torch.cuda.OutOfMemoryError as failure:
            reason = str(failure).splitlines()[0]
            print(f"{name}, batch {spec.batch}: {reason}", flush=True)
            spec = replace(spec, batch=spec.batch // 2)
    raise NotTimed(reason)


def _refuse_wrong_steps(spec: Steps, device: torch.device) -> None:
    """Raise NotTimed unless `ours` computes what the reference kernels compute."""
    try:
        with precision(spec.precision, device):
            check_against_reference(_network_of(spec), _timing_of(spec), device)
    except ValueError as refusal:
        raise NotTimed(str(refusal)) from None
    free_memory(device)


def _compare(spec: Steps, other: Other | None, rounds: int, device: torch.device) -> Measurement:
    """Time all steps of a comparison in turn."""
    with precision(spec.precision, device):
        # Warm up, and hear which kernels each step takes.
        steps = build_steps(spec, other.build() if other else None, device)
        used: dict[str, dict[str, list[str]]] = {}
        for name, step in steps.items():
            kernels.reset_used()
            for _ in range(WARM_UP_RUNS):
                step()
            used[name] = kernels.used()

        repeats = 1
        if device.type == "cuda":
            repeats = max(1, round(LEAST_SECONDS / time_call(steps["ours"], device)))
        seconds = [
            {name: time_call(step, device, repeats) for name, step in steps.items()}
            for _ in range(rounds)
        ]
        settings = {**read_tf32_flags(), "cudnn_benchmark": torch.backends.cudnn.benchmark}

    # Ratios are taken within a round, as the machine's speed drifts.
    values: dict[str, Any] = {
        f"{name}_s": statistics.median(each[name] for each in seconds) for name in steps
    }
    values |= {"rounds": rounds, **settings}
    for label, above, below in RATIOS:
        if above in steps and below in steps:
            ratios = [each[above] / each[below] for each in seconds]
            values[label] = statistics.median(ratios)
            values[f"{label}, spread"] = half_interquartile_range(ratios)
    return Measurement(spec, values, used["ours"])


def build_steps(
    spec: Steps, other: nn.Module | None, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Build `ours` and what it is compared with."""
    network = _network_of(spec)
    steps: dict[str, Callable[[], Any]] = {"ours": build_task(network, _timing_of(spec), device)}

    # An eager loop says nothing beside a compiled or captured one.
    if spec.what == "training" and not (spec.compile or spec.graphs):
        steps["bare"] = bare_training(draw_network(size_backbone(network), device), spec.batch)
    if other is not None:
        steps["plain"] = _build_plain(spec, draw_network(size_backbone(network), device))
        steps["theirs"] = _build_plain(spec, other.to(device))
    return steps


def _build_plain(spec: Steps, model: nn.Module) -> Callable[[], None]:
    """Put a network into the plain loop of its task."""
    if spec.what == "training":
        return plain_training(model, spec.batch)
    return plain_sampling(model, spec.batch, SAMPLING_STEPS[spec.device])


def _measure_ceiling(spec: Steps, store: Store) -> dict[str, float]:
    """Return the MACs of a forward pass, and the most per second that the device reaches.

    The ceiling is a record of its own, which is measured only once.
    """
    ceilings = Ceilings(spec.device, spec.precision)
    record = execute(ceilings, store, Resources(spec.device))
    if record.status != "done":
        raise ValueError(f"the device's ceilings could not be measured: {record.error}")
    return {
        "macs_core": count_backbone(_network_of(spec))["macs_core"],
        "ceiling_macs_per_s": record.values["macs_per_s"],
    }


def _network_of(spec: Steps) -> Cost:
    """Return the network at the latents of ImageNet 256."""
    return Cost(Backbone(spec.network), size=32, channels=4, num_classes=1000)


def _timing_of(spec: Steps) -> Timing:
    network = _network_of(spec)
    return Timing(
        network.backbone,
        network.size,
        network.channels,
        network.num_classes,
        spec.batch,
        spec.device,
        precision=spec.precision,
        what=spec.what,
        num_steps=SAMPLING_STEPS[spec.device],
        compile=spec.compile,
        graphs=spec.graphs,
    )


def _describe(values: dict[str, Any]) -> str:
    """Write a comparison as one line."""
    parts = [f"ours {1e3 * values['ours_s']:.1f} ms"]
    for label, _, _ in RATIOS:
        if label in values:
            spread = values[f"{label}, spread"]
            parts.append(
                f"{label} {values[label]:.3f} ±{spread:.3f}{_describe_target(label, values)}"
            )

    # The share of the ceiling says how far any faster version could go.
    if MATMUL_SHARE in values:
        share = 100 * values[MATMUL_SHARE]
        peak = 2e-12 * values["ceiling_macs_per_s"]
        parts.append(
            f"ours {share:.1f} % of the {peak:.2f} TFLOP/s of a large matrix product"
            f"{_describe_target(MATMUL_SHARE, values)}"
        )
    return "; ".join(parts)


def _describe_target(label: str, values: dict[str, Any]) -> str:
    """Say what is asked of a value, and by how much it is missed."""
    if label not in values["asked"]:
        return ""
    verdict = "reached"
    if label in values["missed"]:
        verdict = f"missed by {100 * values['missed'][label]:.2g} %"
    return f" (asked {values['asked'][label]:g}: {verdict})"
