"""The rows of Tables 1, 2, 8 and 9, and what they are on digits."""

from __future__ import annotations

from experiments.declared.protocols import DIGITS
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Train, spec_id
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLES


def _small_rows() -> dict[str, Row]:
    """One row of every network on digits, by the id of its evaluation."""
    rows = [row for table in TABLES.values() for row in (*table.outside, *table.rows)]
    return {spec_id(evaluate_stage(row, DIGITS, 0)): row for row in rows if row.backbone}


def _small_trainings() -> dict[str, Train]:
    """Every training on digits, by a label."""
    stages = [evaluate_stage(row, DIGITS, 0) for row in SMALL_ROWS.values()]
    trainings = {spec_id(training): training for stage in stages for training in stage.trainings}
    return {
        f"{training.backbone.name} at {training.data.size}, {name}": training
        for name, training in trainings.items()
    }


SMALL_ROWS = _small_rows()
SMALL_TRAININGS = _small_trainings()
