"""Manifests and scored records, for the tests of what decides a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS_WHOLE, IMAGENET256
from experiments.engine.records.comparison import differences
from experiments.engine.records.manifest import Manifest, manifest
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Evaluate, canonical
from experiments.engine.specs.stages import evaluate_stage

SPEC = evaluate_stage(TABLE_4.rows[0], IMAGENET256, 0)
# What is found of a measurement.
MEASURE = {
    "extractor": {"sha256": "ab"},
    "flags": {"matmul_tf32": False, "cudnn_tf32": False},
    "versions": {"torch": "2"},
}
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "2", "dirty": False, "seconds": 1.0}
SHARES = {"is_digits": 8.0, "precision_digits": 0.6, "recall_digits": 0.8, "agreement": 0.9}


def manifest_of(
    spec: Evaluate = SPEC,
    model: dict[str, Any] | None = None,
    batch: int = 250,
    **measure: Any,
) -> Manifest:
    """The manifest of a spec, with further findings of the measurement."""
    weights = model or {"weights_sha256": "1", "key": "ema"}
    return manifest(canonical(spec, full=True), weights, MEASURE | measure, batch=batch)


def pairs(a: Manifest, b: Manifest) -> list[tuple[str, Any, Any]]:
    """The differences of two manifests as (field, value of a, value of b)."""
    return [(each.field, each.a, each.b) for each in differences(a, b)]


def write_score(store: Store, row: int, fd: float, seed: int = 0, **measure: Any) -> Path:
    """Record the scores of a row of Table 4 on digits, measured in a certain way."""
    spec = evaluate_stage(TABLE_4.rows[row], DIGITS_WHOLE, seed)
    values = {"fd_digits": fd, **SHARES, "manifest": manifest_of(spec, **measure)}
    record = store.append(spec, "done", values, PROVENANCE)
    return next((store.root / "records" / "evaluate").glob(f"{record.id}-{record.utc}-*.json"))
