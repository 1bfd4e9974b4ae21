"""Which records and published numbers stand behind the rows of a table, as cells. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from experiments.engine.records.manifest import has_unknown_features
from experiments.engine.records.score_names import SCORES
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.sheet import FAILED, UNDEFINED, Cell
from experiments.engine.reporting.statistics import Values
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Run, Selection
from experiments.engine.specs.spec import Stage, Timing

REFERENCE_SEEDS = range(10)

# what a held-out record adds to the scores of its run
HELDOUT_VALUES = (
    "heldout_loss",
    "heldout_cross_entropy",
    "objective",
    "bits_per_dim",
    "initial_share",
)

# in published tables, a suffix of a number of parameters, and what it is in millions
UNITS = {"M": 1.0, "B": 1000.0}


class Lookup:
    """The records of a selection's rows in one folder."""

    def __init__(self, selection: Selection, folder: RecordFolder) -> None:
        self.selection = selection
        self.folder = folder

    def scored(self, row: Row) -> list[Record]:
        """The evaluations of a row, one per training seed that has one.

        Scores by unknown features stand beside no others, so they are left out.
        """
        return [r for r in self._evaluations(row) if not has_unknown_features(r.values)]

    def by_unknown_features(self, row: Row) -> list[Record]:
        """The evaluations of a row that no table shows."""
        return [r for r in self._evaluations(row) if has_unknown_features(r.values)]

    def _evaluations(self, row: Row) -> list[Record]:
        records = (scored_run(run, self.folder) for run in self.selection.runs_of(row))
        return [record for record in records if record is not None]

    def all_scored(self) -> list[Record]:
        """The evaluations of all rows."""
        return [record for row in self.selection.networks for record in self.scored(row)]

    def score_values(self, row: Row) -> list[dict[str, float]]:
        """The scores of a row, one dictionary per training seed that has a record."""
        return [record.values for record in self.scored(row)]

    def timing(self, row: Row) -> Record | None:
        """The timing of a row, done or else failed; None if it was never timed."""
        stage = self.selection.timing_of(row)
        if stage is None:
            return None
        return self.folder.latest(stage) or self.folder.latest(stage, status="failed")

    def counts(self, row: Row) -> list[Record]:
        """The counts of every network of the published system; none if one of them is missing."""
        records = [self.folder.latest(stage) for stage in self.selection.costs_of(row)]
        if None in records:
            return []
        return [record for record in records if record is not None]

    def has_failed_run(self, row: Row) -> bool:
        """Whether a training or evaluation of the row failed and did not succeed later."""
        return any(
            self.failure(stage) for run in self.selection.runs_of(row) for stage in run.stages
        )

    def failure(self, stage: Stage) -> Record | None:
        """The failed record of a stage that has no finished one."""
        if self.folder.latest(stage):
            return None
        return self.folder.latest(stage, status="failed")

    def measured_stages(self, row: Row) -> list[Stage]:
        """The counts and the timing of a row."""
        timing: Timing | None = self.selection.timing_of(row)
        return [*self.selection.costs_of(row), *([] if timing is None else [timing])]


def scored_run(run: Run, folder: RecordFolder) -> Record | None:
    """The scores of a run, with those of its held-out loss; None if one of them is missing."""
    record = folder.latest(run.stage)
    if record is None or run.heldout is None:
        return record
    heldout = folder.latest(run.heldout)
    if heldout is None:
        return None
    kept = {name: heldout.values[name] for name in HELDOUT_VALUES if name in heldout.values}
    return replace(record, values=record.values | kept)


class PublishedTable:
    """The published numbers of a table's rows."""

    def __init__(self, table: Table, store: Store) -> None:
        self._rows = store.published(table.published, table.key) if table.published else {}
        # a published table has the same columns in every row
        self.columns = {column for row in self._rows.values() for column in row}

    def row(self, row: Row) -> dict[str, str]:
        """The published row by column; empty if the paper has no such row."""
        return self._rows[row.published] if row.published and self._rows else {}

    def cell(self, row: Row, column: str) -> Cell:
        """A published number of a row; a gap if the paper leaves it out."""
        return published_cell(self.row(row).get(column, ""))

    def label(self, row: Row, column: str) -> Cell:
        """A published word of a row; a gap if the paper leaves it out."""
        return Cell(label=self.row(row).get(column, ""))

    def first_with(self, *columns: str) -> str | None:
        """The first of these columns that the table has."""
        return next((column for column in columns if column in self.columns), None)


def published_cell(text: str) -> Cell:
    """A published number with its published digits; one with a unit (675M) as it was printed."""
    if not text:
        return Cell()
    if text[-1] in UNITS:
        return Cell(float(text[:-1]) * UNITS[text[-1]], label=text)
    return Cell(float(text), None, len(text.partition(".")[2]))


def count_cell(lookup: Lookup, row: Row, name: str, unit: float) -> Cell:
    """A count in a unit, summed over the networks of the published system."""
    if not lookup.selection.costs_of(row):
        return Cell()

    # all networks must be counted, or the sum would be of a part
    records = lookup.counts(row)
    if records:
        total = sum(record.values[name] for record in records)
        return Cell(total / unit, records=tuple(records))
    failed = any(lookup.failure(stage) for stage in lookup.selection.costs_of(row))
    return FAILED if failed else Cell()


def timing_cell(record: Record | None, name: str) -> Cell:
    """A value of a timing with its spread."""
    if record is None:
        return Cell()
    if record.status != "done":
        return FAILED
    value, spread = record.values.get(name), record.values.get(f"{name}_spread")
    # One decimal of less than one image a second would be rounding alone.
    digits = 2 if value is not None and value < 1 else None
    return Cell(value, spread, digits, records=(record,))


def score_cell(lookup: Lookup, row: Row, name: str) -> Cell:
    """A score of a row over its training seeds, or that it has none or that its run failed."""
    records = tuple(lookup.scored(row))
    if records and not all(name in record.values for record in records):
        return UNDEFINED
    if records:
        cell = mean_cell(name, [record.values for record in records], SCORES[name].digits)
        return replace(cell, records=records)
    return FAILED if lookup.has_failed_run(row) else Cell()


def mean_cell(name: str, values: Values, digits: int = 2) -> Cell:
    """The mean over seeds with its standard error, or one seed's value with its sampling error."""
    if not values:
        return Cell()
    if len(values) == 1:
        return Cell(values[0][name], values[0].get(f"{name}_se"), digits)
    numbers = [value[name] for value in values]
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return Cell(statistics.fmean(numbers), error, digits)


def ratio_cell(numerator: Cell, denominator: Cell) -> Cell:
    """The ratio of two cells; a gap if one of them is."""
    if not numerator.value or not denominator.value:
        return Cell()
    return Cell(numerator.value / denominator.value)


def describe_seeds(seeds: Sequence[int]) -> str:
    """The training seeds of a table, for a heading."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
