"""What the held-out trainings say of the paper's orders: pairs of rows, compared within seeds.

A pair is resolved if the simultaneous 95 % interval of its difference excludes zero at full length.
It is not settled if half the length gives the other sign. No torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from analysis.query import ReferenceStore
from experiments.declared.campaign import BLOCKS
from experiments.declared.protocols import at_half_length
from experiments.engine.records.score_names import HELDOUT_LOSS
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.reporting.paired import Difference, PairedComparison, compare_paired
from experiments.engine.specs.rows import Table, TableName
from experiments.engine.specs.stages import Protocol, distinct_networks, heldout_stage

# The paper's score that our loss is compared with; lower is better in both.
PAPER_SCORE = "fid"


class PairVerdict(StrEnum):
    """What a pair of rows shows."""

    AS_PAPER = "as the paper"
    AGAINST_PAPER = "against the paper"
    NOT_RESOLVED = "not resolved"
    NOT_SETTLED = "not settled"
    PAPER_EQUAL = "paper equal"


@dataclass(frozen=True)
class Pair:
    """Two rows of a table under a protocol; differences are of `b` against `a`."""

    protocol: str
    table: TableName
    a: str
    b: str
    score: str
    value_a: float
    value_b: float
    # In percent of the score, with the ends of the simultaneous interval.
    difference: float
    low: float
    high: float
    verdict: PairVerdict
    # Of the paper's FID, absolute.
    paper_difference: float


@dataclass(frozen=True)
class Trained:
    """The held-out losses of a table's rows at one length."""

    table: Table
    protocol: Protocol
    # By row, by training seed.
    records: Mapping[str, Mapping[int, Record]]

    @property
    def complete_seeds(self) -> list[int]:
        """The seeds that every row has."""
        seeds = [set(by_seed) for by_seed in self.records.values()]
        return sorted(set.intersection(*seeds)) if seeds else []

    @property
    def lacking(self) -> dict[str, list[int]]:
        """The seeds that a row lacks and another one has, by row."""
        every = {seed for by_seed in self.records.values() for seed in by_seed}
        return {
            row: sorted(every - set(by_seed))
            for row, by_seed in self.records.items()
            if every - set(by_seed)
        }

    def losses(self) -> dict[str, dict[int, float]]:
        """The losses at the complete seeds, by row and seed."""
        return {
            row: {seed: by_seed[seed].values[HELDOUT_LOSS.key] for seed in self.complete_seeds}
            for row, by_seed in self.records.items()
        }

    def mean(self, row: str) -> float | None:
        """The mean loss of a row over the complete seeds; None without them."""
        losses = list(self.losses()[row].values())
        return sum(losses) / len(losses) if losses else None

    def comparison(self) -> PairedComparison | None:
        """The two-way model of rows and seeds; None with fewer than two complete seeds."""
        if len(self.complete_seeds) < 2:
            return None
        return compare_paired(self.losses())


def trained(table: Table, protocol: Protocol, store: ReferenceStore) -> Trained:
    """Look up the held-out losses of a table's rows, one row for each network."""
    records: dict[str, dict[int, Record]] = {}
    for row in distinct_networks(table, protocol):
        found = {}
        for seed in REFERENCE_SEEDS:
            stage = heldout_stage(row, protocol, seed)
            assert stage is not None, f"{protocol.name} scores held-out images"
            record = store.reference.latest(stage)
            if record is not None:
                found[seed] = record
        records[row.label] = found
    return Trained(table, protocol, records)


def subjects() -> list[tuple[Table, Protocol]]:
    """The tables and protocols whose rows the campaign compares, each once."""
    compared = [block for block in BLOCKS if block.compared]
    found = {(block.table.number, block.protocol.name): block for block in compared}
    return [(block.table, block.protocol) for block in found.values()]


def pairs(table: Table, protocol: Protocol, store: ReferenceStore) -> list[Pair]:
    """The pairs of a table; none with fewer than two complete seeds."""
    full = trained(table, protocol, store)
    half = trained(table, at_half_length(protocol), store)
    comparison = full.comparison()
    if comparison is None:
        return []

    paper = paper_scores(table, store)
    found = []
    for difference in comparison.differences:
        a, b = difference.a, difference.b
        gap = paper[b] - paper[a] if a in paper and b in paper else None
        if gap is None:
            continue
        verdict = judge_pair(difference, gap, _gap_at(half, a, b))
        found.append(
            Pair(
                protocol=protocol.name,
                table=table.number,
                a=a,
                b=b,
                score=HELDOUT_LOSS.key,
                value_a=comparison.means[a],
                value_b=comparison.means[b],
                difference=difference.percent,
                low=difference.low,
                high=difference.high,
                verdict=verdict,
                paper_difference=gap,
            )
        )
    return found


def paper_scores(table: Table, store: ReferenceStore) -> dict[str, float]:
    """The paper's scores by the label of the row, for the rows that have one."""
    published = store.published(table.published, table.key)
    scores = {}
    for row in table.rows:
        text = published[row.published].get(PAPER_SCORE, "") if row.published else ""
        if text:
            scores[row.label] = float(text)
    return scores


def judge_pair(difference: Difference, paper_gap: float, half_gap: float | None) -> PairVerdict:
    """Judge a pair.

    Args:
        difference: ours at full length, with its interval.
        paper_gap: the paper's difference.
        half_gap: ours at half length; None if that was not trained.
    """
    if paper_gap == 0:
        return PairVerdict.PAPER_EQUAL
    if not difference.is_resolved:
        return PairVerdict.NOT_RESOLVED
    if half_gap is not None and (half_gap > 0) != (difference.percent > 0):
        return PairVerdict.NOT_SETTLED
    agrees = (difference.percent > 0) == (paper_gap > 0)
    return PairVerdict.AS_PAPER if agrees else PairVerdict.AGAINST_PAPER


def _gap_at(half: Trained, a: str, b: str) -> float | None:
    first, second = half.mean(a), half.mean(b)
    return None if first is None or second is None else second - first


def evidence_csv(store: ReferenceStore) -> str:
    """All pairs of all tables and protocols, one line each, with a heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Pair))
    for table, protocol in subjects():
        for pair in pairs(table, protocol, store):
            writer.writerow(_cells(pair))
    return text.getvalue()


def _cells(pair: Pair) -> Sequence[str]:
    values = [getattr(pair, field.name) for field in fields(Pair)]
    return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
