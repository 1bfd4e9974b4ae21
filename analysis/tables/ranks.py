"""Ranks of rows as far as their training seeds resolve them. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from analysis.evidence.pairs import trained
from analysis.query import ReferenceStore
from experiments.engine.records.score_names import HELDOUT_LOSS
from experiments.engine.reporting.paired import PairedComparison
from experiments.engine.reporting.sheet import Cell, Column, NoteKind, Sheet, Topic
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import Protocol


@dataclass(frozen=True)
class Rank:
    """The first and the last rank that a row may have."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"


def rank_rows(comparison: PairedComparison) -> dict[str, Rank]:
    """The ranks that every row may have, by the simultaneous intervals of all pairs."""
    better: Counter[str] = Counter()
    worse: Counter[str] = Counter()
    for difference in comparison.differences:
        if difference.is_resolved:
            b_is_worse = difference.percent > 0
            worse[difference.b if b_is_worse else difference.a] += 1
            better[difference.a if b_is_worse else difference.b] += 1
    last = len(comparison.means)
    return {row: Rank(1 + worse[row], last - better[row]) for row in comparison.means}


def add_ranks(sheet: Sheet, table: Table, protocol: Protocol, store: ReferenceStore) -> None:
    """Add a column of ranks behind the held-out loss, and mark the row that is best for certain.

    With fewer than two complete seeds nothing is ranked, and the sheet stays as it is.
    """
    side = trained(table, protocol, store)
    comparison = side.comparison()
    if comparison is None:
        return
    ranks = rank_rows(comparison)

    # bold is the loss of rank 1 without doubt
    loss = HELDOUT_LOSS.key
    cells = []
    for row in sheet.rows:
        label = row["row"].label
        rank = ranks.get(label)
        if rank == Rank(1, 1):
            row[loss] = replace(row[loss], best=True)
        records = tuple(side.records[label].values()) if rank else ()
        cells.append(Cell(label=str(rank or ""), records=records))
    group = sheet.column(loss).group
    sheet.add_column(Column("rank", "rank", group, topic=Topic.SCORES), cells, after=loss)
    sheet.note(
        NoteKind.SCORES,
        f"rank: by the {HELDOUT_LOSS.name}, as far as {comparison.num_seeds} seeds resolve it, "
        "rows compared within seeds (95 % over all pairs, Tukey). Bold is rank 1 for certain.",
    )
