"""Cells of counts, timings and scores from records. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import Lookup
from experiments.engine.reporting.sheet import FAILED, Cell
from experiments.engine.reporting.statistics import Values
from experiments.engine.specs.rows import Row


def score_digits(name: str) -> int:
    """The decimals that a score is printed with."""
    return 1 if name.startswith(("fd", "is", "fid")) else 2


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
    return Cell(record.values.get(name), record.values.get(f"{name}_spread"), records=(record,))


def score_cell(lookup: Lookup, row: Row, name: str) -> Cell:
    """A score of a row over its training seeds, or that its run failed."""
    records = tuple(lookup.scored(row))
    if records:
        cell = mean_cell(name, [record.values for record in records], score_digits(name))
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


def difference_cell(ours: Cell, paper: Cell) -> Cell:
    """Our difference from a published number, in per cent of it; a gap if one of them is."""
    if ours.value is None or paper.value is None:
        return Cell()
    return Cell(100 * (ours.value / paper.value - 1), records=ours.records)


def describe_seeds(seeds: Sequence[int]) -> str:
    """The training seeds of a table, for a heading."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
