"""A job: stages that one process, or one group of processes, runs one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from experiments.engine.records.store import Record, Store
from experiments.engine.specs.spec import Stage, spec_id

GAIN = 1.02  # in images per second, for which a sweep goes on to the next batch


class JobEvent(StrEnum):
    """What a running job reports, and the payload that comes with it."""

    # A Progress.
    PROGRESS = "progress"
    # A stage and its Record.
    RECORD = "record"
    # A text in one line.
    ERROR = "error"
    # None: the job's process has ended.
    END = "end"


@dataclass(frozen=True)
class Job:
    """Stages that run one after another."""

    # What the user sees.
    label: str
    stages: tuple[Stage, ...]
    # Whether the stages depend on each other: a training that fails ends the job.
    chain: bool = False
    # Label of the row under which a site file gives the job resources. "": the job's own label.
    row: str = ""
    # Records of stages that ran earlier, if they matter to the stages that are left.
    before: tuple[Record, ...] = ()
    # What the user sees in place of `label` for the stages of other rows, by the stages' ids.
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    def label_of(self, stage: Stage) -> str:
        """Return what the user sees for one of the stages."""
        return self.labels.get(spec_id(stage), self.label)

    def left(self, store: Store) -> Job:
        """Return the job without its stages that are done."""
        stages = tuple(stage for stage in self.stages if store.here.latest(stage) is None)
        return replace(self, stages=stages)

    def ended(self, records: Sequence[Record]) -> bool:
        """Return whether nothing is to run after the stages that gave these records."""
        if not self.chain:
            return False
        return any(record.status != "done" and record.kind == "train" for record in records)

    def failed(self, records: Sequence[Record]) -> bool:
        """Return whether the job counts as failed after these records."""
        return any(record.status != "done" for record in records)


class Sweep(Job):
    """Timings at growing batches.

    It ends after two batches in a row that do not pay (one of them may be a busy moment), or
    after a batch that fails, for example for lack of memory.
    """

    def left(self, store: Store) -> Sweep:
        """Return the sweep from the first batch without a record on."""
        tried: list[Record] = []
        for stage in self.stages:
            record = store.here.latest(stage)
            if record is None:
                break
            tried.append(record)
        untried = self.stages[len(tried) :]

        # A batch that failed after others is where the sweep ended.
        failure = store.here.latest(untried[0], status="failed") if tried and untried else None
        if failure:
            tried.append(failure)
        return replace(self, stages=() if self.ended(tried) else untried, before=tuple(tried))

    def ended(self, records: Sequence[Record]) -> bool:
        """Return whether larger batches no longer pay."""
        rates = [
            record.values["images_per_s"] if record.status == "done" else 0.0 for record in records
        ]
        if 0.0 in rates:
            return True
        return len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2])

    def failed(self, records: Sequence[Record]) -> bool:
        """Return whether not even the smallest batch could be timed."""
        return bool(records) and records[0].status != "done"
