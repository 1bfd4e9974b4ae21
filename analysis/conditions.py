"""Ours under the conditions of published rows: throughput on GPUs by numeric mode, and Inception scores beside the paper's. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.query import Sources, gpu_timings, numeric_mode
from experiments.engine.manifest import score_name
from experiments.engine.report import Cell, Sheet
from experiments.engine.rows import Row, Table
from experiments.engine.store import Record
from experiments.protocols import IMAGENET256, IMAGENET256_OWN, IMAGENET512, IMAGENET512_OWN, Protocol, cost_stages, evaluate_stage
from experiments.systems import difference

PAPER_BATCH = 64  # of its throughput
SCORES = ("fid", "is", "precision", "recall")  # of the paper's tables, Table 7 apart
SCORES_NOTE = (
    "a training by the row's published recipe, seed 0, and its published sampler, ± sampling standard error; no bias: FID without what a finite number of images adds, "
    "which published values contain; FID diff. %: of the published FID."
)


def add_conditions(sheet: Sheet, table: Table, resolution: int, store: Sources) -> list[Record]:
    """Append the columns of our GPU timings and of our scores to a table of the paper's; the records that they hold."""
    published = store.published(table.published, table.key)
    timings = [gpu_timings(row.backbone, cost_stages(row)[0].size, store) if row.backbone else [] for row in table.rows]
    ordered = [sorted((record for record in found if record.spec["batch"] <= PAPER_BATCH), key=lambda record: record.spec["batch"]) for found in timings]
    shown = [{(record.provenance["device"], numeric_mode(record)): record for record in found} for found in ordered]
    for device, mode in sorted({mode for found in shown for mode in found}) or [("GPU", "")]:
        append(sheet, (f"ours, {device}", f"img/s, {mode}" if mode else "img/s"), [_timed(found.get((device, mode))) for found in shown])
    papers = [published[row.published] if row.published else {} for row in table.rows]
    scored = [_scored(row, paper, resolution, store) for row, paper in zip(table.rows, papers, strict=True)]
    columns = score_columns("ours, same protocol", SCORES, IMAGENET256 if resolution == 256 else IMAGENET512)
    for column, cells in zip(columns, zip(*map(score_cells, scored, papers, [SCORES] * len(papers)), strict=True), strict=True):
        append(sheet, column, cells)
    if any(shown):
        sheet.notes.append(f"ours on a GPU: in each numeric mode at the largest batch timed up to the paper's {PAPER_BATCH}.")
    sheet.notes.append(f"ours, same protocol: {SCORES_NOTE}")
    return [*(record for found in shown for record in found.values()), *filter(None, scored)]


def score_columns(group: str, names: Sequence[str], protocol: Protocol) -> list[tuple[str, str]]:
    """Of `score_cells`: every score with its N, FID also without bias and as a difference."""
    made = []
    for name in names:
        made += [(group, score_name(name, protocol.num))]
        made += [(group, score_name("fid_corrected", protocol.num)), (group, "FID diff. %")] if name == "fid" else []
    return made


def score_cells(record: Record | None, paper: dict[str, str], names: Sequence[str]) -> list[Cell]:
    """Our scores beside a published row's; gaps without a record."""
    made = []
    for name in names:
        ours = _score(record, name)
        made += [ours]
        made += [_score(record, "fid_corrected"), difference(ours, number_cell(paper.get("fid", "")))] if name == "fid" else []
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
    return Cell(record.values["images_per_s"], record.values.get("images_per_s_spread"), records=(record,)) if record else Cell()


def _score(record: Record | None, name: str) -> Cell:
    return Cell(record.values.get(name), record.values.get(f"{name}_se"), records=(record,)) if record else Cell()


def _scored(row: Row, paper: dict[str, str], resolution: int, store: Sources) -> Record | None:
    """Of our scores under the published row's conditions: the common recipe where the paper stops after its steps, else the system's own.

    A row without a method of its own has the common recipe under both.
    """
    if not row.backbone:
        return None
    common, own = (IMAGENET256, IMAGENET256_OWN) if resolution == 256 else (IMAGENET512, IMAGENET512_OWN)
    protocol = common if paper.get("train_steps") == str(common.recipe.steps) else own
    return store.latest(evaluate_stage(row, protocol, 0), "reference")
