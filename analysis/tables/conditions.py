"""Ours under the conditions of published rows: GPU throughput and Inception scores. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.query import PAPER_BATCH, ReferenceStore, gpu_timings, numeric_mode
from experiments.declared.protocols import (
    IMAGENET256,
    IMAGENET256_OWN,
    IMAGENET512,
    IMAGENET512_OWN,
)
from experiments.declared.timings import is_written_out
from experiments.engine.records.comparison import clashes
from experiments.engine.records.score_names import (
    FID,
    FID_CORRECTED,
    INCEPTION,
    PAPER_SCORES,
    Score,
    score_title,
)
from experiments.engine.records.store import Record
from experiments.engine.reporting.caveats import timing_caveats, unrecorded_caveats
from experiments.engine.reporting.efficiency.counts import difference
from experiments.engine.reporting.efficiency.speed import unfused
from experiments.engine.reporting.lookup import PublishedTable, published_cell
from experiments.engine.reporting.sheet import (
    Cell,
    Column,
    Note,
    NoteKind,
    Sheet,
    SheetRow,
    Topic,
)
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.stages import Protocol, cost_stages, evaluate_stage

# the scores of the paper's tables apart from Table 7, with their titles there

SCORES_NOTE = (
    "one training by the row's published recipe with seed 0, and its published sampler; ±: the "
    "sampling standard error; no bias: FID without what a finite number of images adds, which "
    "published values contain; diff. %: our difference from the published score."
)

# (device, numeric mode)
Mode = tuple[str, str]


@dataclass(frozen=True)
class Conditions:
    """What was measured here under the conditions of a table's rows."""

    table: Table
    published: list[dict[str, str]]
    # of every row, by device and numeric mode
    timings: list[dict[Mode, Record]]
    # of every row
    scores: list[Record | None]

    @property
    def records(self) -> list[Record]:
        """All records that the columns hold."""
        timings = [record for by_mode in self.timings for record in by_mode.values()]
        return timings + [record for record in self.scores if record]


def add_conditions(
    sheet: Sheet, table: Table, resolution: int, store: ReferenceStore
) -> list[Record]:
    """Append our GPU timings and scores to a table; return the records that they come from."""
    paper = PublishedTable(table, store)
    published = [paper.row(row) for row in table.rows]
    conditions = Conditions(
        table,
        published,
        [_timings_of(row, store) for row in table.rows],
        [
            _score_of(row, numbers, resolution, store)
            for row, numbers in zip(table.rows, published, strict=True)
        ],
    )

    # Columns of speed come first, then columns of scores.
    _add_timings(sheet, conditions, "throughput_img_s" in paper.columns)
    protocol = IMAGENET256 if resolution == 256 else IMAGENET512
    _add_scores(sheet, conditions, protocol)
    return conditions.records


def _timings_of(row: Row, store: ReferenceStore) -> dict[Mode, Record]:
    """By numeric mode, a row's GPU timing at the largest batch up to the paper's."""
    if row.backbone is None:
        return {}
    timings = gpu_timings(row.backbone, cost_stages(row)[0].size, store)
    fitting = [record for record in timings if record.spec["batch"] <= PAPER_BATCH]
    fitting.sort(key=lambda record: record.spec["batch"])
    return {(record.provenance["device"], numeric_mode(record)): record for record in fitting}


def _score_of(
    row: Row, published: dict[str, str], resolution: int, store: ReferenceStore
) -> Record | None:
    """Our scores of a row under its published conditions."""
    if row.backbone is None:
        return None
    return store.reference.latest(evaluate_stage(row, same_conditions(published, resolution), 0))


def same_conditions(published: dict[str, str], resolution: int) -> Protocol:
    """The common recipe for a published row that stops after its steps, else the system's own.

    A row without a method of its own has the common recipe under both.
    """
    common, own = IMAGENET256, IMAGENET256_OWN
    if resolution == 512:
        common, own = IMAGENET512, IMAGENET512_OWN
    return common if published.get("train_steps") == str(common.recipe.steps) else own


def _add_timings(sheet: Sheet, conditions: Conditions, compared: bool) -> None:
    """Append images per second in every mode, with the difference from the paper's."""
    modes = sorted({mode for by_mode in conditions.timings for mode in by_mode})

    # Each mode of a device has a column, with its difference from the paper where there is one.
    for device, mode in modes:
        group, key = f"ours, {device}", f"{device}/{mode}"
        cells = [_rate_cell(by_mode.get((device, mode))) for by_mode in conditions.timings]
        column = Column(f"img_s/{key}", f"img/s, {mode}", group, topic=Topic.SPEED)
        sheet.add_column(column, cells)
        if compared:
            rates = [
                published_cell(row.get("throughput_img_s", "")) for row in conditions.published
            ]
            column = Column(f"img_s_diff/{key}", f"diff. %, {mode}", group, topic=Topic.SPEED)
            sheet.add_column(
                column,
                [difference(ours, paper) for ours, paper in zip(cells, rates, strict=True)],
            )

    if modes:
        sheet.notes += _timing_notes(conditions)


def _rate_cell(record: Record | None) -> Cell:
    if record is None:
        return Cell()
    spread = record.values.get("images_per_s_spread")
    return Cell(record.values["images_per_s"], spread, records=(record,))


def _timing_notes(conditions: Conditions) -> list[Note]:
    """At which batch rows were timed, what their timings say, and what ran without a kernel."""
    texts = [
        "ours on a GPU: in each numeric mode at the largest timed batch up to the paper's "
        f"{PAPER_BATCH}. diff. %: our difference from the paper's figure, which is an A100's."
    ]
    texts += _batch_notes(conditions)
    notes = [Note(NoteKind.SPEED, text) for text in texts]
    notes += timing_caveats(list(_labelled_timings(conditions)))

    # what ran in plain PyTorch
    plain: dict[str, list[str]] = {}
    for label, record in _labelled_timings(conditions):
        for description in unfused(record):
            plain.setdefault(description, []).append(label)
    for row, by_mode in zip(conditions.table.rows, conditions.timings, strict=True):
        if by_mode and is_written_out(row):
            description = "attention written out as in the authors' code"
            plain.setdefault(description, []).append(row.label)
    notes += [
        Note(NoteKind.SPEED, f"Without a fused kernel, {description}: {', '.join(labels)}.")
        for description, labels in plain.items()
    ]
    return notes


def _batch_notes(conditions: Conditions) -> list[str]:
    """Sentences on rows that were timed at another batch than the paper's."""
    labels: dict[int, list[str]] = {}
    for label, record in _labelled_timings(conditions):
        labels.setdefault(record.spec["batch"], []).append(label)
    return [
        f"Timed at batch {batch}, not {PAPER_BATCH}: {', '.join(names)}."
        for batch, names in sorted(labels.items())
        if batch != PAPER_BATCH
    ]


def _labelled_timings(conditions: Conditions) -> Iterable[tuple[str, Record]]:
    for row, by_mode in zip(conditions.table.rows, conditions.timings, strict=True):
        for (_, mode), record in by_mode.items():
            yield f"{row.label} ({mode})", record


def _add_scores(sheet: Sheet, conditions: Conditions, protocol: Protocol) -> None:
    """Append our scores under the published conditions, with differences from the paper's."""
    rows = [
        score_cells(record, published, PAPER_SCORES)
        for record, published in zip(conditions.scores, conditions.published, strict=True)
    ]
    for column in score_columns("ours, same protocol", PAPER_SCORES, protocol):
        sheet.add_column(column, [row[column.key] for row in rows])
    if any(conditions.scores):
        sheet.note(NoteKind.SCORES, f"ours, same protocol: {SCORES_NOTE}")
    labels = [row.label for row in conditions.table.rows]
    sheet.notes += clash_notes(labels, conditions.scores)


def score_columns(group: str, scores: Sequence[Score], protocol: Protocol) -> list[Column]:
    """The columns of `score_cells`: every score, FID without bias, and every difference."""
    columns = []
    for score in scores:
        titled = [score, FID_CORRECTED] if score is FID else [score]
        titles = [
            (f"ours_{part.key}", score_title(part, INCEPTION, protocol.num)) for part in titled
        ]
        titles.append((f"ours_{score.key}_diff", f"{score.short} diff. %"))
        columns += [Column(key, title, group, topic=Topic.SCORES) for key, title in titles]
    return columns


def score_cells(
    record: Record | None, published: dict[str, str], scores: Sequence[Score]
) -> SheetRow:
    """Our scores beside a published row's, by the keys of `score_columns`."""
    cells: SheetRow = {"ours_fid_corrected": _score_cell(record, FID_CORRECTED)}
    for score in scores:
        ours = _score_cell(record, score)
        paper = published_cell(published.get(score.paper, ""))
        cells[f"ours_{score.key}"] = ours
        cells[f"ours_{score.key}_diff"] = difference(ours, paper)
    return cells


def _score_cell(record: Record | None, score: Score) -> Cell:
    if record is None:
        return Cell()
    return Cell(record.values.get(score.key), record.values.get(score.error), records=(record,))


def clash_notes(labels: Sequence[str], scores: Sequence[Record | None]) -> list[Note]:
    """Notes on scores whose protocol differs from the first one's, so that they do not compare.

    Also on fields of the protocol that only some of the records hold.
    """
    scored = [
        (label, record) for label, record in zip(labels, scores, strict=True) if record is not None
    ]
    if not scored:
        return []

    # rows by the fields in which they differ
    first_label, first = scored[0]
    others: dict[tuple[str, ...], list[str]] = {}
    for label, record in scored:
        fields = clashes([record], [first])
        if fields:
            others.setdefault(tuple(fields), []).append(label)
    texts = [
        f"ours: not ranked against {first_label}, since scored by another protocol "
        f"({', '.join(fields)}): {', '.join(names)}."
        for fields, names in others.items()
    ]
    notes = [Note(NoteKind.SCORES, text) for text in texts]
    return notes + unrecorded_caveats([record for _, record in scored])
