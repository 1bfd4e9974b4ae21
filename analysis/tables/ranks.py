"""Ranks of rows as far as their training seeds resolve them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from analysis.query import ReferenceStore, rankable
from experiments.engine.records.score_names import Better, ranking_score
from experiments.engine.reporting.sheet import Cell, Column, NoteKind, Sheet, Topic
from experiments.engine.reporting.statistics import Values, mean_score, noise_bound, pool_spread
from experiments.engine.specs.rows import Row
from experiments.engine.specs.stages import Protocol


@dataclass(frozen=True)
class Rank:
    """The first and the last rank that a row may have."""

    first: int
    last: int

    @property
    def is_certain(self) -> bool:
        """Whether the seeds leave one rank only."""
        return self.first == self.last

    def __str__(self) -> str:
        return f"{self.first}" if self.is_certain else f"{self.first} to {self.last}"


def rank_rows(name: str, better: Better, values: Sequence[Values]) -> list[Rank | None]:
    """The ranks that every row may have, by Bonferroni over all pairs.

    None for a row without scores, and for all rows if none has repeated seeds.
    """
    spread = pool_spread(name, values)
    if spread is None:
        return [None] * len(values)

    # means of the rows with scores; the lowest is the best
    sign = 1 if better is Better.LOWER else -1
    means = {at: sign * mean_score(name, row) for at, row in enumerate(values) if row}
    pairs = len(means) * (len(means) - 1) // 2

    def is_clearly_better(i: int, j: int) -> bool:
        bound = noise_bound(spread, len(values[i]), len(values[j]), pairs)
        return means[j] - means[i] > bound

    ranks: list[Rank | None] = [None] * len(values)
    for at in means:
        above = sum(is_clearly_better(other, at) for other in means)
        below = sum(is_clearly_better(at, other) for other in means)
        ranks[at] = Rank(1 + above, len(means) - below)
    return ranks


def add_ranks(sheet: Sheet, rows: Sequence[Row], protocol: Protocol, store: ReferenceStore) -> None:
    """Add a column of ranks behind the ranking score, and mark the row that is best for certain."""
    score = ranking_score(protocol.features)
    scores, refused = rankable(rows, protocol, store)
    values = [[record.values for record in records] for records in scores]
    ranks = rank_rows(score.key, score.better, values)

    # bold is the score of rank 1 without doubt
    for row, rank in zip(sheet.rows, ranks, strict=True):
        if rank == Rank(1, 1):
            row[score.key] = replace(row[score.key], best=True)
    cells = [
        Cell(label="" if rank is None else str(rank), records=tuple(records))
        for rank, records in zip(ranks, scores, strict=True)
    ]
    group = sheet.column(score.key).group
    sheet.add_column(Column("rank", "rank", group, topic=Topic.SCORES), cells, after=score.key)

    sheet.note(
        NoteKind.SCORES,
        f"rank: by {score.key}, as far as the seeds resolve it (95 % over all pairs, Bonferroni). "
        "Bold is rank 1 for certain.",
        *(
            f"{label} is not ranked, since it was scored by another protocol ({', '.join(fields)})."
            for label, fields in refused.items()
        ),
    )
