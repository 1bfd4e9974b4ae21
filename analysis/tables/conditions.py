"""Ours under the conditions of published rows: throughput on GPUs by numeric mode, and Inception scores beside the paper's. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from analysis.query import PAPER_BATCH, ReferenceStore, gpu_timings, numeric_mode
from experiments.declared.protocols import (
    IMAGENET256,
    IMAGENET256_OWN,
    IMAGENET512,
    IMAGENET512_OWN,
)
from experiments.declared.timings import is_written_out
from experiments.engine.records.comparison import clashes, not_recorded
from experiments.engine.records.manifest import score_name
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.counts import difference
from experiments.engine.reporting.efficiency.speed import unfused
from experiments.engine.reporting.notes import timing_caveats
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import Protocol, cost_stages, evaluate_stage, train_stage

SCORES = {
    "fid": "FID",
    "is": "IS",
    "precision": "P",
    "recall": "R",
}  # of the paper's tables, Table 7 apart
SCORES_NOTE = (
    "a training by the row's published recipe, seed 0, and its published sampler, ± sampling standard error; no bias: FID without what a finite number of images adds, "
    "which published values contain; diff. %: of the published score."
)


def add_conditions(
    sheet: Sheet, table: Table, resolution: int, store: ReferenceStore
) -> list[Record]:
    """Append the columns of our GPU timings and of our scores to a table of the paper's; the records that they hold."""
    published = store.published(table.published, table.key)
    papers = [published[row.published] if row.published else {} for row in table.rows]
    timings = [
        gpu_timings(row.backbone, cost_stages(row)[0].size, store) if row.backbone else []
        for row in table.rows
    ]
    ordered = [
        sorted(
            (record for record in found if record.spec["batch"] <= PAPER_BATCH),
            key=lambda record: record.spec["batch"],
        )
        for found in timings
    ]
    shown = [
        {(record.provenance["device"], numeric_mode(record)): record for record in found}
        for found in ordered
    ]
    for device, mode in sorted({mode for found in shown for mode in found}) or [("GPU", "")]:
        cells = [_timed(found.get((device, mode))) for found in shown]
        append(sheet, (f"ours, {device}", f"img/s, {mode}" if mode else "img/s"), cells)
        if any("throughput_img_s" in paper for paper in papers):
            rates = [number_cell(paper.get("throughput_img_s", "")) for paper in papers]
            append(
                sheet,
                (f"ours, {device}", f"diff. %, {mode}" if mode else "diff. %"),
                [difference(ours, paper) for ours, paper in zip(cells, rates, strict=True)],
            )
    scored = [
        _scored(row, paper, resolution, store)
        for row, paper in zip(table.rows, papers, strict=True)
    ]
    columns = score_columns(
        "ours, same protocol", SCORES, IMAGENET256 if resolution == 256 else IMAGENET512
    )
    for column, cells in zip(
        columns,
        zip(*map(score_cells, scored, papers, [SCORES] * len(papers)), strict=True),
        strict=True,
    ):
        append(sheet, column, cells)
    labels = [row.label for row in table.rows]
    if any(shown):
        sheet.notes += _timing_notes(table.rows, shown)
    sheet.notes.append(f"ours, same protocol: {SCORES_NOTE}")
    sheet.notes += clash_notes(labels, scored)
    return [*(record for found in shown for record in found.values()), *filter(None, scored)]


def _timing_notes(rows: Sequence[Row], shown: Sequence[dict[tuple[str, str], Record]]) -> list[str]:
    """At which batch rows were timed, what their timings say of themselves, and what ran without a fused kernel."""
    batches: dict[int, list[str]] = {}
    plain: dict[str, list[str]] = {}
    for row, found in zip(rows, shown, strict=True):
        for (_, mode), record in found.items():
            batches.setdefault(record.spec["batch"], []).append(f"{row.label} ({mode})")
            for how in unfused(record):
                plain.setdefault(how, []).append(f"{row.label} ({mode})")
        if found and is_written_out(row):
            plain.setdefault("attention written out as in the authors' code", []).append(row.label)
    notes = [
        f"ours on a GPU: in each numeric mode at the largest batch timed up to the paper's {PAPER_BATCH}; diff. %: of the paper's figure, which is an A100's."
    ]
    notes += [
        f"timed at batch {batch}, not {PAPER_BATCH}: {', '.join(labels)}."
        for batch, labels in sorted(batches.items())
        if batch != PAPER_BATCH
    ]
    notes += timing_caveats(
        [
            (f"{row.label} ({mode})", record)
            for row, found in zip(rows, shown, strict=True)
            for (_, mode), record in found.items()
        ]
    )
    return notes + [
        f"{how}, without a fused kernel: {', '.join(labels)}." for how, labels in plain.items()
    ]


def clash_notes(labels: Sequence[str], scored: Sequence[Record | None]) -> list[str]:
    """Which of our scores were measured otherwise than the first of them, and in what; such rows are not to be ranked against each other. And what some do not record."""
    first = next(
        ((label, record) for label, record in zip(labels, scored, strict=True) if record), None
    )
    other: dict[tuple[str, ...], list[str]] = {}
    for label, record in zip(labels, scored, strict=True):
        if record and (fields := clashes([record], [first[1]])):
            other.setdefault(tuple(fields), []).append(label)
    notes = [
        f"ours: {', '.join(names)}: not ranked against {first[0]}, scored by another protocol ({', '.join(fields)})."
        for fields, names in other.items()
    ]
    return notes + not_recorded([record for record in scored if record])


def score_columns(
    group: str, names: Mapping[str, str], protocol: Protocol
) -> list[tuple[str, str]]:
    """Of `score_cells`: every score with its N, FID also without bias, and its difference under its name in the paper."""
    made = []
    for name, short in names.items():
        made += [(group, score_name(name, protocol.num))]
        made += [(group, score_name("fid_corrected", protocol.num))] if name == "fid" else []
        made += [(group, f"{short} diff. %")]
    return made


def score_cells(
    record: Record | None, paper: dict[str, str], names: Mapping[str, str]
) -> list[Cell]:
    """Our scores beside a published row's; gaps without a record."""
    made = []
    for name in names:
        ours = _score(record, name)
        made += [ours]
        made += [_score(record, "fid_corrected")] if name == "fid" else []
        made += [difference(ours, number_cell(paper.get(name, "")))]
    return made


def number_cell(text: str) -> Cell:
    """A published number with the digits that were published."""
    return Cell(float(text), None, len(text.partition(".")[2])) if text else Cell()


def append(sheet: Sheet, column: tuple[str, str], cells: Sequence[Cell]) -> None:
    insert(sheet, len(sheet.columns), column, cells)


def insert(sheet: Sheet, at: int, column: tuple[str, str], cells: Sequence[Cell]) -> None:
    sheet.columns.insert(at, column)
    for row, cell in zip(sheet.rows, cells, strict=True):
        row.insert(at, cell)


def _timed(record: Record | None) -> Cell:
    return (
        Cell(
            record.values["images_per_s"],
            record.values.get("images_per_s_spread"),
            records=(record,),
        )
        if record
        else Cell()
    )


def _score(record: Record | None, name: str) -> Cell:
    return (
        Cell(record.values.get(name), record.values.get(f"{name}_se"), records=(record,))
        if record
        else Cell()
    )


def _scored(
    row: Row, paper: dict[str, str], resolution: int, store: ReferenceStore
) -> Record | None:
    """Of our scores under the published row's conditions."""
    return (
        store.reference.latest(evaluate_stage(row, same_conditions(paper, resolution), 0))
        if row.backbone
        else None
    )


def same_conditions(paper: dict[str, str], resolution: int) -> Protocol:
    """The common recipe where the published row stops after its steps, else the system's own; a row without a method of its own has the common recipe under both."""
    common, own = (
        (IMAGENET256, IMAGENET256_OWN) if resolution == 256 else (IMAGENET512, IMAGENET512_OWN)
    )
    return common if paper.get("train_steps") == str(common.recipe.steps) else own


def progress_row(model: str) -> Row:
    """A model of Table 7."""
    return Row(model, Backbone(model.lower().replace("-", "_")), {}, None)


def progress_score(paper: dict[str, str], store: ReferenceStore) -> Record | None:
    """Of our scores that of a row of Table 7."""
    return store.reference.latest(
        evaluate_stage(progress_row(paper["model"]), stopped(int(paper["train_steps"])), 0)
    )


def progress_curve(model: str, steps: Sequence[int], store: ReferenceStore) -> Record | None:
    """The longest of our trainings of a model of Table 7 to one of these ascending numbers of steps, of those whose record holds a loss curve."""
    trained = (
        store.reference.latest(train_stage(progress_row(model), stopped(step), 0))
        for step in reversed(steps)
    )
    return next((record for record in trained if record and record.values.get("curve")), None)


def stopped(steps: int) -> Protocol:
    """Table 7's conditions after so many steps."""
    return replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, steps=steps))
