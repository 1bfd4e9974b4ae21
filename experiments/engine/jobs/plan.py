"""What a command still has to run, as jobs, and what that will cost. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from experiments.engine.jobs.estimate import duration, matches_device, training_seconds
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.memory import Share, amount, describe_parts, known_needs, memory_of
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.memory import Parts
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Cost, Stage, Train, kind_of, spec_id


@dataclass(frozen=True)
class TablePlan:
    """The jobs of the selected part of a table."""

    selection: Selection
    # Further resources of the trainer: fields of RunContext's Resources.
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where trainings and timings run: 'cpu' or 'cuda'."""
        return self.selection.device

    def counts(self) -> list[Job]:
        """Return one job for all counts: the first one is slow, the others are not."""
        rows = self.selection.counted
        stages = [stage for row in rows for stage in self.selection.costs_of(row)]
        return [Job("counts", _distinct(stages))]

    def timings(self) -> list[Job]:
        """Return one job for each network, however many rows show it."""
        jobs: dict[str, Job] = {}
        for label, stage in self.selection.timings.items():
            jobs.setdefault(spec_id(stage), Job(label, (stage,)))
        return list(jobs.values())

    def trainings(self) -> list[Job]:
        """Return one job for each training of a system, with all evaluations that need it.

        Rows that share a training share the job of the first of them.
        """
        jobs: list[Job] = []
        for run in self.selection.runs:
            # The jobs that already hold one of this run's trainings become one job.
            needed = {spec_id(train) for train in run.trainings}
            shared = [job for job in jobs if needed & {spec_id(stage) for stage in job.stages}]
            label = f"{run.row.label}, seed {run.seed}"
            first = shared[0] if shared else Job(label, (), chain=True, row=run.row.label)
            stages = [stage for job in shared for stage in job.stages]
            labels = dict.fromkeys(map(spec_id, run.stages), label)
            for job in shared:
                labels |= {spec_id(stage): job.label_of(stage) for stage in job.stages}
            merged = replace(first, stages=_trainings_first([*stages, *run.stages]), labels=labels)

            position = jobs.index(first) if shared else len(jobs)
            jobs = [job for job in jobs if job not in shared]
            jobs.insert(position, merged)
        return jobs


@dataclass(frozen=True)
class ListPlan:
    """Jobs that are listed one by one, and not declared by a table's protocol."""

    # Where the jobs run: 'cpu' or 'cuda'.
    device: str
    costs: tuple[Cost, ...] = ()
    # Jobs that need the machine to themselves.
    alone: tuple[Job, ...] = ()
    # Jobs that all processes of a scheduled job work at.
    together: tuple[Job, ...] = ()
    # Further resources of the trainer: fields of RunContext's Resources.
    resources: dict[str, Any] = field(default_factory=dict)
    # Expected seconds of stages without a record, by the stage's id.
    seconds: dict[str, float] = field(default_factory=dict)

    def counts(self) -> list[Job]:
        """Return one job for all counts."""
        return [Job("counts", _distinct(self.costs))]

    def timings(self) -> list[Job]:
        """Return the jobs that need the machine to themselves."""
        return list(self.alone)

    def trainings(self) -> list[Job]:
        """Return the jobs that several processes work at."""
        return list(self.together)


Plan = TablePlan | ListPlan


def missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    """Return what of the jobs is left: no stage that is done, and no job that is done."""
    left = [job.left(store) for job in jobs]
    return [job for job in left if job.stages]


def describe(plan: Plan, store: Store) -> str:
    """Return one line per stage: whether it is done, or what it is expected to take."""
    lines: list[str] = []
    seconds, unknown = 0.0, 0
    memory = _Memory(store)

    # A stage without a record adds its expected time to the total.
    for planned in _stages(plan):
        state, costs = "done", []
        if store.here.latest(planned.stage) is None:
            failed = store.here.latest(planned.stage, status="failed")
            state = "failed before, would run again" if failed else "would run"
            expected = _expected_seconds(planned, plan, store)
            if expected is None:
                unknown += 1
            else:
                seconds += expected
                costs.append(f"about {duration(expected)}")
            costs += memory.of(planned)

        name, kind = spec_id(planned.stage), kind_of(planned.stage)
        line = f"{name}  {kind:8}  {planned.label:34}  {state}  {', '.join(costs)}"
        lines.append(line.rstrip())

    total = f"total: {_total(seconds, unknown, plan.device)}"
    return "\n".join([*lines, *memory.summary(), total])


class _Memory:
    """What the trainings of a plan need, each in one process of its own."""

    def __init__(self, store: Store) -> None:
        self._known = known_needs(store)
        # Label, parts and micro-batch of the training that needs the most.
        self._most: tuple[str, Parts, int] | None = None

    def of(self, planned: _Planned) -> list[str]:
        """Return what a stage needs; nothing if it is no training or that is not predicted."""
        if not isinstance(planned.stage, Train):
            return []
        found = memory_of(planned.stage, Share(), self._known)
        if found is None:
            return []
        parts, images = found
        if self._most is None or parts.total > self._most[1].total:
            self._most = planned.label, parts, images
        return [amount(parts.total)]

    def summary(self) -> list[str]:
        """Return the line about the training that needs the most."""
        if self._most is None:
            return []
        label, parts, images = self._most
        return [
            f"memory: at most {amount(parts.total)}, by {label}: {describe_parts(parts, images)}"
        ]


def _total(seconds: float, unknown: int, device: str) -> str:
    unit = "GPU" if device == "cuda" else "process"
    plural = "" if unknown == 1 else "s"
    parts = []
    if seconds or not unknown:
        parts.append(f"about {duration(seconds)} of {unit} time")
    if unknown:
        parts.append(f"{unknown} stage{plural} of unknown length")
    return ", and ".join(parts)


class _Planned(NamedTuple):
    """A stage of a plan."""

    label: str
    # Label of the row under which a site file gives the stage's job resources, or "".
    row: str
    stage: Stage


def _stages(plan: Plan) -> Iterator[_Planned]:
    """Yield every stage of a plan once, under the label of the first job that has it."""
    seen: set[str] = set()
    for planned in (*_counted(plan), *_scheduled(plan)):
        name = spec_id(planned.stage)
        if name not in seen:
            seen.add(name)
            yield planned


def _counted(plan: Plan) -> Iterator[_Planned]:
    if isinstance(plan, ListPlan):
        for stage in plan.costs:
            yield _Planned(stage.backbone.name, "", stage)
        return
    for row in plan.selection.counted:
        for stage in plan.selection.costs_of(row):
            yield _Planned(row.label, row.label, stage)


def _scheduled(plan: Plan) -> Iterator[_Planned]:
    for job in (*plan.timings(), *plan.trainings()):
        for stage in job.stages:
            yield _Planned(job.label_of(stage), job.row, stage)


def _expected_seconds(planned: _Planned, plan: Plan, store: Store) -> float | None:
    """Return how long a stage should take, by its own records or as its plan expects."""
    stage = planned.stage
    is_count = isinstance(stage, Cost)
    for source in (store.here, store.reference):
        record = source.latest(stage)
        if record and (is_count or matches_device(record, plan.device)):
            return float(record.provenance["seconds"])
    if is_count:
        return 1.0
    if isinstance(plan, ListPlan):
        return plan.seconds.get(spec_id(stage))
    if isinstance(stage, Train):
        return _expected_training(stage, planned.row, plan.selection, store)
    return None


def _expected_training(train: Train, row: str, selection: Selection, store: Store) -> float | None:
    estimate = training_seconds(train, selection.table.row(row), selection, store)
    if estimate:
        return estimate.seconds
    hours = selection.protocol.cost_hours
    return hours * 3600 if hours and selection.device == "cpu" else None


def _distinct(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """Return the stages without repetitions."""
    return tuple({spec_id(stage): stage for stage in stages}.values())


def _trainings_first(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """Return the stages without repetitions, trainings before evaluations."""
    return tuple(sorted(_distinct(stages), key=lambda stage: not isinstance(stage, Train)))
