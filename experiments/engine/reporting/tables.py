"""From a selection and its records to sheets: ours beside the paper's numbers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.engine.records.score_names import (
    DIGITS_TEXT,
    HELDOUT_CROSS_ENTROPY,
    HELDOUT_LOSS,
    PAPER_SCORES,
    TABLE_SCORES,
    Score,
    score_title,
)
from experiments.engine.records.store import RecordFolder, Store
from experiments.engine.reporting.aligned.pairs import alignment_sheet, has_pairs
from experiments.engine.reporting.captioned.binding import binding_sheet, real_rows
from experiments.engine.reporting.comparison import comparison_sheet
from experiments.engine.reporting.efficiency.savings import gated_rows, savings_sheet
from experiments.engine.reporting.lookup import (
    Lookup,
    PublishedTable,
    count_cell,
    describe_seeds,
    ratio_cell,
    score_cell,
    timing_cell,
)
from experiments.engine.reporting.notes import (
    count_notes,
    record_notes,
    row_notes,
    score_notes,
    speed_notes,
)
from experiments.engine.reporting.sheet import Cell, Column, Kind, Sheet, Topic
from experiments.engine.specs.rows import Row
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import spec_id

# the paper's scores, and their titles

# what the paper's scores were measured at: the titles, and the columns of the published tables
PAPER_STEPS = ("steps", "train_steps")
PAPER_GUIDED = ("guided", "cfg")


@dataclass(frozen=True)
class Filled:
    """A column, and what fills it."""

    column: Column
    cell: Callable[[Row], Cell]


def report_sheets(selection: Selection, store: Store) -> list[Sheet]:
    """What a command prints of its own records: the table, and what a small protocol adds."""
    sheets = [main_sheet(selection, store, store.here)]
    if selection.protocol.features == DIGITS_TEXT and not selection.table.counts_only:
        sheets.append(binding_sheet(selection, store.here))
    if has_pairs(selection):
        sheets.append(alignment_sheet(selection, store.here))
    if gated_rows(selection):
        sheets.append(savings_sheet(selection, store, store.here))
    if shares_runs(selection):
        sheets.append(family_sheet(selection, store, store.here))
    # A study of one's own has no committed reference.
    is_published = bool(selection.table.published)
    if selection.protocol.small and not selection.table.counts_only and is_published:
        sheets.append(comparison_sheet(selection, store))
    return sheets


def shares_runs(selection: Selection) -> bool:
    """Whether a small protocol trains one network for several of the rows."""
    runs = selection.with_seeds([0]).runs
    return selection.protocol.small and len({spec_id(run.stage) for run in runs}) < len(runs)


def main_sheet(selection: Selection, store: Store, folder: RecordFolder) -> Sheet:
    """Counts, throughput and scores from a folder of records beside the paper's.

    Scores of a network that stands for several rows are left to `family_sheet`.
    """
    table, lookup = selection.table, Lookup(selection, folder)
    paper = PublishedTable(table, store)
    machine = "this machine" if folder is store.here else "reference"
    scored = not table.counts_only and not shares_runs(selection)

    # columns, each with what fills it
    filled = _name_columns(paper) + _count_columns(lookup, paper)
    if table.timed:
        filled += _speed_columns(lookup, paper, machine)
    if scored:
        filled += _score_columns(lookup, machine)
    if not table.counts_only or "fid" in paper.columns:
        filled += _paper_score_columns(paper, f"paper: {table.conditions}")

    # rows, then notes
    sheet = Sheet(
        f"Table {table.number}: {table.title} ({table.source})", [each.column for each in filled]
    )
    for row in selection.rows:
        sheet.add_row({each.column.key: each.cell(row) for each in filled})
    if scored and selection.protocol.features == DIGITS_TEXT:
        sheet.rows += real_rows(lookup.all_scored())
    sheet.notes += count_notes(selection) + speed_notes(lookup) + row_notes(selection)
    if not table.counts_only:
        sheet.notes += score_notes(lookup, store) if scored else []
        sheet.notes += record_notes(lookup, with_measurements=True, with_scores=scored)
    return sheet


def family_sheet(selection: Selection, store: Store, folder: RecordFolder) -> Sheet:
    """The scores of a small protocol, one row per network that it trains."""
    rows_of: dict[str, list[Row]] = {}
    for run in selection.with_seeds([0]).runs:
        rows_of.setdefault(spec_id(run.stage), []).append(run.row)
    networks = selection.with_rows([rows[0] for rows in rows_of.values()])
    labels = {rows[0].label: [row.label for row in rows] for rows in rows_of.values()}
    names = {row.label: networks.runs_of(row)[0].stage.train.backbone.name for row in networks.rows}

    # the network that is trained, the rows that it stands for, and its scores
    lookup = Lookup(networks, folder)
    machine = "this machine" if folder is store.here else "reference"
    filled = [
        Filled(Column("row", "family", kind=Kind.PROSE), lambda row: Cell(label=row.label)),
        Filled(
            Column("network", "shrunk network", kind=Kind.PROSE),
            lambda row: Cell(label=names[row.label]),
        ),
        *_score_columns(lookup, machine),
        Filled(
            Column("stands_for", "stands for", kind=Kind.PROSE),
            lambda row: Cell(label=", ".join(labels[row.label])),
        ),
    ]
    title = f"Table {selection.table.number}: the families on {selection.protocol.name}"
    sheet = Sheet(title, [each.column for each in filled])
    for row in networks.rows:
        sheet.add_row({each.column.key: each.cell(row) for each in filled})
    sheet.notes += score_notes(lookup, store)
    sheet.notes += record_notes(lookup, with_measurements=False, with_scores=True)
    return sheet


def _name_columns(paper: PublishedTable) -> list[Filled]:
    filled = [Filled(Column("row", "row", kind=Kind.PROSE), lambda row: Cell(label=row.label))]
    if "type" in paper.columns:
        column = Column("type", "type", kind=Kind.PROSE)
        filled.append(Filled(column, lambda row: paper.label(row, "type")))
    return filled


def _count_columns(lookup: Lookup, paper: PublishedTable) -> list[Filled]:
    """Parameters and Gflops: the paper's, ours by its counter, and ours by one rule for all."""
    filled = []
    params = paper.first_with("params_m", "params")
    if params:
        column = Column("params_paper", "paper", "params, M", topic=Topic.COUNTS)
        filled.append(Filled(column, lambda row: paper.cell(row, params)))

    # Ours stand beside the paper's, and the counter's Gflops beside those of the common rule.
    return [
        *filled,
        Filled(
            Column("params", "ours", "params, M", digits=1, topic=Topic.COUNTS),
            lambda row: count_cell(lookup, row, "params_trainable", 1e6),
        ),
        Filled(
            Column("gflops_paper", "paper", "Gflops", topic=Topic.COUNTS),
            lambda row: paper.cell(row, "gflops"),
        ),
        Filled(
            Column("gflops", "ours", "Gflops", topic=Topic.COUNTS),
            lambda row: count_cell(lookup, row, "macs_torchprofile", 1e9),
        ),
        Filled(
            Column("gflops_core", "core", "Gflops", topic=Topic.COUNTS),
            lambda row: count_cell(lookup, row, "macs_core", 1e9),
        ),
    ]


def _speed_columns(lookup: Lookup, paper: PublishedTable, machine: str) -> list[Filled]:
    """Images per second and their ratio to the baseline's: ours, and the paper's on an A100."""
    ours, theirs = f"throughput, {machine}", "paper, A100"
    base = paper.cell(lookup.selection.table.baseline, "throughput_img_s")
    return [
        Filled(
            Column("img_s", "img/s", ours, digits=1, topic=Topic.SPEED),
            lambda row: timing_cell(lookup.timing(row), "images_per_s"),
        ),
        Filled(
            Column("relative", "rel.", ours, topic=Topic.SPEED),
            lambda row: timing_cell(lookup.timing(row), "relative"),
        ),
        Filled(
            Column("paper_img_s", "img/s", theirs, topic=Topic.SPEED),
            lambda row: paper.cell(row, "throughput_img_s"),
        ),
        Filled(
            Column("paper_relative", "rel.", theirs, topic=Topic.SPEED),
            lambda row: ratio_cell(paper.cell(row, "throughput_img_s"), base),
        ),
    ]


def _score_columns(lookup: Lookup, machine: str) -> list[Filled]:
    """Our scores under the selection's protocol; the key of a column is the score's name."""
    selection = lookup.selection
    protocol = selection.protocol
    group = f"{protocol.name} ({machine}, {describe_seeds(selection.seeds)})"

    def filled(score: Score) -> Filled:
        title = score_title(score, protocol.features, protocol.num)
        topic = Topic.HELD_OUT if score.held_out else Topic.SCORES
        column = Column(score.key, title, group, topic=topic)
        return Filled(
            column, lambda row: score_cell(lookup, row, score.key) if row.backbone else Cell()
        )

    # Networks that predict tokens have a held-out loss of their own.
    scores = list(TABLE_SCORES[protocol.features])
    if HELDOUT_LOSS in scores and any(row.predicts_tokens for row in selection.networks):
        scores.insert(1, HELDOUT_CROSS_ENTROPY)
    return [filled(score) for score in scores]


def _paper_score_columns(paper: PublishedTable, group: str) -> list[Filled]:
    """The paper's scores, with the training steps and the guidance behind them where it says."""
    filled = []
    title, key = PAPER_STEPS
    if key in paper.columns:
        column = Column("paper_steps", title, group, topic=Topic.SCORES)
        filled.append(Filled(column, lambda row: paper.cell(row, PAPER_STEPS[1])))
    title, key = PAPER_GUIDED
    if key in paper.columns:
        column = Column("paper_guided", title, group, kind=Kind.PROSE, topic=Topic.SCORES)
        filled.append(Filled(column, lambda row: paper.label(row, PAPER_GUIDED[1])))

    def scored(score: Score) -> Filled:
        column = Column(f"paper_{score.paper}", score.short, group, topic=Topic.SCORES)
        return Filled(column, lambda row: paper.cell(row, score.paper))

    return filled + [scored(score) for score in PAPER_SCORES]
