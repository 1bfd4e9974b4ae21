"""The part of a table that one command is about, with its specs derived once.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Cost, Evaluate, HeldOut, Timing, Train
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    evaluate_stage,
    heldout_stage,
    timed_rows,
    timing_stage,
)


@dataclass(frozen=True)
class Run:
    """One training seed of one row, with the evaluation that they stand for."""

    row: Row
    seed: int
    stage: Evaluate
    # The loss on held-out images; None if the protocol does not measure it.
    heldout: HeldOut | None = None

    @classmethod
    def of(cls, row: Row, protocol: Protocol, seed: int) -> Run:
        """Return the run of a row under a protocol."""
        evaluation = evaluate_stage(row, protocol, seed)
        return cls(row, seed, evaluation, heldout_stage(row, protocol, seed))

    @property
    def trainings(self) -> tuple[Train, ...]:
        """Return the trainings that the evaluation needs, in an order in which they can run."""
        return self.stage.trainings

    @property
    def stages(self) -> tuple[Train | Evaluate | HeldOut, ...]:
        """Return the trainings, then the evaluation and the held-out loss."""
        scores = (self.stage,) if self.heldout is None else (self.stage, self.heldout)
        return (*self.trainings, *scores)


@dataclass(frozen=True)
class Selection:
    """Rows of a table under one protocol, resolved once to (row, seed, stage).

    Plans, command lines and reports take a Selection. Without it they would pass table, rows,
    protocol, seeds and device one by one, and derive the same specs again at every use.

        selection = Selection(table, rows, protocol, seeds, device)
        selection.runs                     # every (row, seed, stage), seed by seed
        selection.runs_of(row)             # the seeds of one row
        selection.costs_of(row)            # the row's Cost stages
        selection.timing_of(row)           # the row's Timing, or None if it is not timed
        selection.with_seeds(range(10))    # the same rows at other training seeds
    """

    # Declares the rows and the baseline that the other rows are compared with.
    table: Table
    # The rows in the order of the report. A row without a network is not run.
    rows: Sequence[Row]
    protocol: Protocol
    # The training seeds, in order.
    seeds: Sequence[int]
    # 'cpu' or 'cuda': where trainings and timings run.
    device: str
    # Whether the user named the rows. A CPU times heavy rows only if they are named.
    named: bool = False

    @property
    def networks(self) -> list[Row]:
        """Return the rows that can be run."""
        return [row for row in self.rows if row.backbone]

    @property
    def counted(self) -> list[Row]:
        """Return the rows that are counted, which need not be run."""
        return [row for row in self.rows if cost_stages(row)]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Return every run, seed by seed and row by row; none if the table trains nothing."""
        seeds = () if self.table.counts_only else self.seeds
        return tuple(Run.of(row, self.protocol, seed) for seed in seeds for row in self.networks)

    @cached_property
    def _runs_by_label(self) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {row.label: [] for row in self.rows}
        for run in self.runs:
            runs[run.row.label].append(run)
        return runs

    def runs_of(self, row: Row) -> list[Run]:
        """Return the runs of one row, seed by seed; none if the row has no network."""
        return self._runs_by_label[row.label]

    def costs_of(self, row: Row) -> tuple[Cost, ...]:
        """Return the counts that make up a row's published system."""
        return cost_stages(row)

    @cached_property
    def timings(self) -> dict[str, Timing]:
        """Return the timing of every row that is timed here, by the row's label."""
        rows = timed_rows(self.table, self.rows, self.device, self.named)
        return {row.label: timing_stage(row, self.table.baseline, self.device) for row in rows}

    def timing_of(self, row: Row) -> Timing | None:
        """Return a row's timing; None if the row is not timed.

        Other than `timings`, this names the timing of a heavy row on a CPU too: it may have a
        record from an earlier command that named the row.
        """
        if not timed_rows(self.table, [row], self.device, named=True):
            return None
        return timing_stage(row, self.table.baseline, self.device)

    def with_seeds(self, seeds: Sequence[int]) -> Selection:
        """Return the same rows at other training seeds."""
        return replace(self, seeds=seeds)

    def with_rows(self, rows: Sequence[Row]) -> Selection:
        """Return other rows of the same table, under the same protocol and seeds."""
        return replace(self, rows=rows)
