"""From a spec to its record: run a stage once, keep what it gave or why it failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from backbones import kernels
from experiments.engine import cost, evaluate, timing, train
from experiments.engine.precision import flags, precision
from experiments.engine.spec import Cost, Evaluate, Stage, Timing, Train
from experiments.engine.store import Record, Store, provenance
from experiments.engine.train import Resources

Report = Callable[[int, int, float, float], None]


def execute(spec: Stage, store: Store, resources: Resources, report: Report) -> Record:
    """The stage's record: an old one if it is done, else a new one. Failures are records too.

    Another process at the same stage is waited for. Raises OSError where results cannot be written.
    """
    require_device(resources.device)
    with store.lock(spec):
        store.refresh()
        if done := store.latest(spec):
            return done
        kernels.reset_used()
        started = time.perf_counter()
        values, status, error = {}, "done", None
        try:
            values = _run(spec, store, resources, report)
        except OSError:
            raise
        except Exception as failure:  # a failed row is a result, and the others go on
            status, error = "failed", f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
        return store.append(spec, status, values, _provenance(spec, resources, time.perf_counter() - started), error)


def require_device(device: str) -> None:
    """Raise ValueError in one line if a GPU was asked for and torch cannot use one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no usable GPU: torch {torch.__version__} was built for CUDA {torch.version.cuda}; update the driver or pass --device cpu")


def _run(spec: Stage, store: Store, resources: Resources, report: Report) -> dict[str, Any]:
    if isinstance(spec, Cost):
        return cost.run(spec)
    if isinstance(spec, Timing):
        return timing.run(spec)
    if isinstance(spec, Train):
        return train.run(spec, store.run_dir(spec), resources, report)
    assert isinstance(spec, Evaluate), spec
    return evaluate.run(spec, store.run_dir(spec.train), store.root / "runs" / "classifiers", resources, report)


def _provenance(spec: Stage, resources: Resources, seconds: float) -> dict[str, Any]:
    device = torch.device(resources.device)
    with precision(getattr(getattr(spec, "recipe", spec), "precision", "fp32"), device):
        in_force = flags()
    return provenance() | {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "micro_batch": resources.micro_batch,
        "sample_batch": resources.sample_batch,
        "precision_flags": in_force,
        "kernels": kernels.used(),
        "seconds": round(seconds, 2),
    }
