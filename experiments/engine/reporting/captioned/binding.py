"""What captions add to a table: scores of real images, and when words bind. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.engine.records.score_names import DIGITS_TEXT, TABLE_SCORES
from experiments.engine.records.store import Record, RecordFolder
from experiments.engine.reporting.lookup import Lookup, scored_run
from experiments.engine.reporting.sheet import (
    GAP,
    Cell,
    Column,
    Kind,
    NoteKind,
    Sheet,
    SheetRow,
    Topic,
)
from experiments.engine.specs.selection import Run, Selection

REAL = "real images"
BINDING = (
    "The first step after which half of all pairs are painted as they are named, by averages that "
    "a training stores on its way, of relative width 0.05, sampled once by every caption in 10 "
    "steps. Binding appears suddenly, and its step varies from seed to seed."
)


def real_rows(scored: Sequence[Record]) -> list[SheetRow]:
    """Return the row of real images, which all records score alike; none without a record."""
    if not scored:
        return []
    values, records = scored[0].values, (scored[0],)
    cells = {
        score.key: Cell(
            values[f"{score.key}_real"],
            values.get(f"{score.error}_real"),
            score.digits,
            records=records,
        )
        for score in TABLE_SCORES[DIGITS_TEXT]
    }
    return [{"row": Cell(label=REAL)} | cells]


def binding_sheet(selection: Selection, folder: RecordFolder) -> Sheet:
    """Return the step of binding of every row and seed."""
    lookup = Lookup(selection, folder)
    columns = [Column("row", "row", kind=Kind.PROSE)]
    columns += [
        Column(f"seed_{seed}", f"seed {seed}", "binding at step", digits=0, topic=Topic.SCORES)
        for seed in selection.seeds
    ]
    sheet = Sheet(f"When binding appears on {selection.protocol.name}", columns)
    for row in selection.networks:
        runs = lookup.selection.runs_of(row)
        cells = {f"seed_{run.seed}": _step(run, folder) for run in runs}
        sheet.add_row({"row": Cell(label=row.label)} | cells)
    sheet.note(NoteKind.SCORES, BINDING)
    return sheet


def _step(run: Run, folder: RecordFolder) -> Cell:
    """Return the step of a run, or that it has none; a gap without a record."""
    record = scored_run(run, folder)
    if record is None or "binding_step" not in record.values:
        return GAP
    step = record.values["binding_step"]
    if step is None:
        last = record.values["course"]["steps"][-1]
        return Cell(label=f"not in {last}", records=(record,))
    return Cell(float(step), records=(record,))
