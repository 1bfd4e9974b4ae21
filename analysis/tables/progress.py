"""Table 7 of the paper: scores over the length of a training, and ours beside them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.query import ReferenceStore
from analysis.tables.caveats import record_caveats
from analysis.tables.conditions import SCORES_NOTE, clash_notes, score_cells, score_columns
from experiments.declared.protocols import IMAGENET256
from experiments.engine.records.score_names import PAPER_SCORES_WITH_SFID
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import published_cell
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet, Topic
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import Protocol, evaluate_stage, train_stage

SCORES = PAPER_SCORES_WITH_SFID


def progress_sheet(store: ReferenceStore) -> Sheet:
    """Published scores over training without guidance, and ours after as many steps."""
    columns = [
        Column("model", "model", kind=Kind.PROSE),
        Column("steps", "steps"),
        *(
            Column(f"paper_{score.paper}", score.short, "paper: ImageNet 256", topic=Topic.SCORES)
            for score in SCORES
        ),
        *score_columns("ours", SCORES, IMAGENET256),
    ]
    sheet = Sheet("Table 7: Scores over training (DiCo paper, Table 7)", columns)

    # one row per model and length of training
    scores = []
    for published in store.rows("table7.csv"):
        record = progress_score(published, store)
        scores.append(record)
        cells = score_cells(record, published, SCORES)
        cells["model"] = Cell(label=published["model"])
        cells["steps"] = published_cell(published["train_steps"])
        for score in SCORES:
            cells[f"paper_{score.paper}"] = published_cell(published[score.paper])
        sheet.add_row(cells)

    sheet.note(
        NoteKind.SCORES,
        "50K images, no guidance. A row of ours is a gap if no record of so many training steps "
        f"on {IMAGENET256.name} is committed.",
    )
    if any(scores):
        sheet.note(NoteKind.SCORES, f"ours: {SCORES_NOTE}")
    models, steps = sheet.values("model"), sheet.values("steps")
    labels = [
        f"{model.text()} after {step.text()} steps"
        for model, step in zip(models, steps, strict=True)
    ]
    sheet.notes += clash_notes(labels, scores)
    sheet.notes += record_caveats([record for record in scores if record])
    return sheet


def progress_row(model: str) -> Row:
    """A model of Table 7."""
    return Row(model, Backbone(model.lower().replace("-", "_")), {}, None)


def stopped(steps: int) -> Protocol:
    """Table 7's conditions after so many steps."""
    return replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, steps=steps))


def progress_score(published: dict[str, str], store: ReferenceStore) -> Record | None:
    """Our score of a row of Table 7."""
    protocol = stopped(int(published["train_steps"]))
    stage = evaluate_stage(progress_row(published["model"]), protocol, 0)
    return store.reference.latest(stage)


def progress_curve(model: str, steps: Sequence[int], store: ReferenceStore) -> Record | None:
    """Our longest training of a model of Table 7 whose record holds a loss curve.

    Args:
        model: a model of Table 7.
        steps: the lengths of training that are looked up, ascending.
        store: the committed records.
    """
    for length in reversed(steps):
        record = store.reference.latest(train_stage(progress_row(model), stopped(length), 0))
        if record and record.values.get("curve"):
            return record
    return None
