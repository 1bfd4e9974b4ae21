"""How a CPU orders a table's rows by throughput, beside the paper's GPU. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.paired import RankAgreement, rank_agreement
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import timing_stage

# a normal distribution's standard deviation over half its interquartile range
NORMAL = 1.4826
FEWEST_ROWS = 3


@dataclass(frozen=True)
class SpeedAgreement:
    """How the CPU's relative throughput orders the rows, and the timings behind it."""

    agreement: RankAgreement
    # one per row
    records: tuple[Record, ...]


def speed_agreement(table: Table, store: ReferenceStore) -> SpeedAgreement | None:
    """How the CPU orders a table's rows by throughput; None with fewer than three rows timed."""
    published = store.published(table.published, table.key)
    timings = {
        row.label: record
        for row in table.rows
        if (record := store.reference.latest(timing_stage(row, table.baseline, "cpu")))
    }
    if len(timings) < FEWEST_ROWS:
        return None

    ratios = {label: record.values["relative"] for label, record in timings.items()}
    errors = {label: NORMAL * record.values["relative_spread"] for label, record in timings.items()}
    paper = {
        row.label: float(published[row.published or ""]["throughput_img_s"])
        for row in table.rows
        if row.label in timings
    }
    return SpeedAgreement(rank_agreement(ratios, errors, paper), tuple(timings.values()))
