from __future__ import annotations

from collections.abc import Sequence

from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Stage
from experiments.engine.specs.stages import Protocol, evaluate_stage

SCORES = {
    "digits": {
        "fd_digits": "lower",
        "is_digits": "higher",
        "precision_digits": "higher",
        "recall_digits": "higher",
        "agreement": "higher",
    },
    "cifar_classifier": {
        "fd_cifar_classifier": "lower",
        "is_cifar_classifier": "higher",
        "precision_cifar_classifier": "higher",
        "recall_cifar_classifier": "higher",
        "agreement": "higher",
    },
    "inception": {
        "fid": "lower",
        "fid_corrected": "lower",
        "is": "higher",
        "precision": "higher",
        "recall": "higher",
    },
}


PAPER_SCORES = {"fid": "FID", "is": "IS", "precision": "P", "recall": "R"}


PAPER_CONDITIONS = {"steps": "train_steps", "guided": "cfg"}


REFERENCE_SEEDS = range(10)


def _latest(store: Store, stage: Stage, source: RecordFolder) -> Record | None:
    return source.latest(stage) or source.latest(stage, status="failed")


def seed_values(
    store: Store, row: Row, protocol: Protocol, seeds: Sequence[int], source: RecordFolder
) -> list[dict[str, float]]:
    """Scores of a row's training seeds, of those that have a record."""
    return [record.values for record in _records(store, row, protocol, seeds, source)]


def _records(
    store: Store, row: Row, protocol: Protocol, seeds: Sequence[int], source: RecordFolder
) -> list[Record]:
    found = (source.latest(evaluate_stage(row, protocol, seed)) for seed in seeds)
    return [record for record in found if record is not None]


def _run(row: Row, protocol: Protocol, seed: int) -> tuple[Stage, ...]:
    """The trainings of a row and the evaluation that hangs on them."""
    stage = evaluate_stage(row, protocol, seed)
    return *stage.trainings, stage
