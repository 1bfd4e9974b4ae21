"""Temporary results folders whose committed records a test makes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.query import ReferenceStore
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.manifest import manifest
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Table
from experiments.engine.specs.spec import Evaluate, canonical
from experiments.engine.specs.stages import (
    Protocol,
    distinct_networks,
    evaluate_stage,
    heldout_stage,
)

PROVENANCE: dict[str, Any] = {
    "device": "cpu",
    "cpu": "a CPU",
    "cpu_count": 2,
    "torch": "2",
    "python": "3",
    "dirty": False,
    "seconds": 1.0,
    "commit": "c" * 40,
    "precision_flags": {"cudnn_tf32": False, "matmul_tf32": False},
}
GPU_PROVENANCE = PROVENANCE | {"device": "a GPU"}


def commit_records(folder: Path) -> ReferenceStore:
    """Turn the records of a results folder into its committed ones."""
    (folder / "records").rename(folder / "reference")
    return ReferenceStore(folder)


def reopen_records(folder: Path) -> Store:
    """Turn the committed records of a folder back, so that more can be added."""
    (folder / "reference").rename(folder / "records")
    return Store(folder)


def digits_values(fd: float, features: str = "digits", **changes: float) -> dict[str, Any]:
    """The scores of one evaluation on a small classifier's features."""
    values = {
        f"fd_{features}": fd,
        f"is_{features}": 8.0,
        f"precision_{features}": 0.6,
        f"recall_{features}": 0.8,
        "agreement": 0.9,
    }
    return values | changes


def imagenet_values(
    stage: Evaluate, fid: float, error: float | None = 0.1, quantiser: str = "rounds"
) -> dict[str, Any]:
    """The scores of one evaluation on ImageNet, whose protocol includes the quantiser."""
    return {
        "fid": fid,
        "fid_se": error,
        "fid_corrected": fid,
        "sfid": 9.0,
        "is": 20.0,
        "precision": 0.5,
        "recall": 0.5,
        "manifest": manifest(canonical(stage, full=True), {}, {"quantiser": quantiser}),
    }


def add_losses(store: Store, losses: dict[str, float], table: Table = TABLE_4) -> None:
    """Append held-out losses on digits of three seeds, which deviate by a thousandth.

    Rows that are not named have a loss of 1.
    """
    for number, row in enumerate(distinct_networks(table, DIGITS)):
        for seed in range(3):
            stage = heldout_stage(row, DIGITS, seed)
            assert stage is not None
            deviation = 0.001 * ((5 * number + 3 * seed) % 4 - 1.5)
            values = {"heldout_loss": losses.get(row.label, 1.0) * (1 + deviation)}
            store.append(stage, "done", values, PROVENANCE)


def reference_of_scores(
    folder: Path,
    scores: dict[str, list[float]],
    table: Table = TABLE_4,
    protocol: Protocol = DIGITS,
) -> ReferenceStore:
    """Committed records of one Fréchet distance per seed for the rows of these labels."""
    store = Store(folder)
    for row in table.rows:
        for seed, distance in enumerate(scores.get(row.label, [])):
            stage = evaluate_stage(row, protocol, seed)
            values = digits_values(distance, protocol.features)
            store.append(stage, "done", values, PROVENANCE)
    return commit_records(folder)


def timing_values(rate: float = 50.0, spread: float = 1.0, **changes: Any) -> dict[str, Any]:
    """What a timing measured."""
    values = {
        "images_per_s": rate,
        "images_per_s_spread": spread,
        "relative": 1.0,
        "relative_spread": 0.0,
        "peak_memory_bytes": None,
        "joules_per_image": None,
    }
    return values | changes
