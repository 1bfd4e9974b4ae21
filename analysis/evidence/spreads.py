"""What shared initial weights do to the spread over training seeds. No torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

from analysis.evidence.pairs import trained
from analysis.query import ReferenceStore
from analysis.tables.pages import Block, Text
from experiments.declared.campaign import SPREAD_ROWS
from experiments.declared.protocols import with_independent_weights
from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Cell, Column, Kind, Sheet
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import Protocol

FEWEST_SEEDS = 3
BySeed = Mapping[int, Record]


def spread_blocks(table: Table, protocol: Protocol, store: ReferenceStore) -> list[Block]:
    """The spread of three rows and of their differences; nothing where they were not trained."""
    rows = tuple(row for row in table.rows if row.label in SPREAD_ROWS)
    if len(rows) < len(SPREAD_ROWS):
        return []
    small = replace(table, rows=rows, against=None)
    shared = trained(small, protocol, store).records
    independent = trained(small, with_independent_weights(protocol), store).records
    seeds = [set(by_seed) for side in (shared, independent) for by_seed in side.values()]
    common = sorted(set.intersection(*seeds))
    if len(common) < FEWEST_SEEDS:
        return []

    sheet = Sheet(
        "",
        [
            Column("what", "loss of", kind=Kind.PROSE),
            Column("shared", "spread with shared weights, %"),
            Column("independent", "with independent weights, %"),
        ],
    )
    labels = [row.label for row in rows]
    for label in labels:
        sheet.add_row(_spread_row(label, [shared[label]], [independent[label]], common))
    for a, b in itertools.combinations(labels, 2):
        sheet.add_row(
            _spread_row(
                f"{b} over {a}",
                [shared[b], shared[a]],
                [independent[b], independent[a]],
                common,
            )
        )
    text = (
        f"The standard deviation over {len(common)} seeds of the logarithm of the loss, with "
        "initial weights that rows share and with independent ones:"
    )
    return [Text(text), sheet]


def _spread_row(
    label: str, shared: list[BySeed], independent: list[BySeed], seeds: list[int]
) -> dict[str, Cell]:
    return {
        "what": Cell(label=label),
        "shared": _spread(shared, seeds),
        "independent": _spread(independent, seeds),
    }


def _spread(sides: list[BySeed], seeds: list[int]) -> Cell:
    """The spread of a log loss, or of the difference of two."""
    first, *others = sides
    values = []
    for seed in seeds:
        value = math.log(first[seed].values["heldout_loss"])
        values.append(value - sum(math.log(o[seed].values["heldout_loss"]) for o in others))
    records = tuple(side[seed] for side in sides for seed in seeds)
    return Cell(100 * statistics.stdev(values), records=records)
