"""What a table still lacks, as jobs, and what that will cost. No torch."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.engine.jobs.pool import Job
from experiments.engine.records.store import Record, Store
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import FACTOR, Cost, Stage, Train, is_latent, kind_of, spec_id
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    evaluate_stage,
    timed_rows,
    timing_stage,
    train_stage,
)


@dataclass(frozen=True)
class Chosen:
    """The part of a table that a command is about; `named` says that its rows were asked for by name, `resources` are further ones of the trainer."""

    table: Table
    rows: Sequence[Row]
    protocol: Protocol
    seeds: Sequence[int]
    device: str
    named: bool = False
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> list[Row]:
        """The rows that can be run: the others hold published numbers alone."""
        return [row for row in self.rows if row.backbone]

    def counts(self) -> list[Job]:
        """One job: the first count is slow, the others are not."""
        return [
            Job(
                "counts",
                tuple(
                    {
                        spec_id(stage): stage for row in self.networks for stage in cost_stages(row)
                    }.values()
                ),
            )
        ]

    def timings(self) -> list[Job]:
        """One job a network, however many rows it has."""
        jobs: dict[str, Job] = {}
        for row in timed_rows(self.table, self.networks, self.device, self.named):
            stage = timing_stage(row, self.table.baseline, self.device)
            jobs.setdefault(spec_id(stage), Job(row.label, (stage,)))
        return list(jobs.values())

    def trainings(self) -> list[Job]:
        """The trainings of a system with every evaluation that hangs on them; rows that share a training share the first one's job."""
        jobs: list[Job] = []
        for seed in self.seeds if not self.table.counts_only else ():
            for row in self.networks:
                stage = evaluate_stage(row, self.protocol, seed)
                needed = {spec_id(train) for train in stage.trainings}
                shared = [job for job in jobs if needed & set(map(spec_id, job.stages))]
                if not shared:
                    shared = [Job(f"{row.label}, seed {seed}", (), chain=True, row=row.label)]
                    jobs += shared
                stages = {
                    spec_id(one): one
                    for one in (
                        *(one for job in shared for one in job.stages),
                        *stage.trainings,
                        stage,
                    )
                }
                jobs[jobs.index(shared[0])] = replace(
                    shared[0],
                    stages=tuple(
                        sorted(stages.values(), key=lambda one: not isinstance(one, Train))
                    ),
                )
                jobs = [job for job in jobs if job not in shared[1:]]
        return jobs


@dataclass(frozen=True)
class Listed:
    """Jobs that no table's protocol declares: counts; what has a machine to itself; and what all processes of a job work at.

    `resources` are further ones of the trainer; `seconds` what stages without a record are expected to take, by their ids.
    """

    device: str
    costs: tuple[Cost, ...] = ()
    alone: tuple[Job, ...] = ()
    together: tuple[Job, ...] = ()
    resources: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def counts(self) -> list[Job]:
        return [Job("counts", tuple({spec_id(stage): stage for stage in self.costs}.values()))]

    def timings(self) -> list[Job]:
        return list(self.alone)

    def trainings(self) -> list[Job]:
        return list(self.together)


Plan = Chosen | Listed


def missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    """The jobs without their stages that are done, and without those that lack none."""
    return [job for job in (job.left(store) for job in jobs) if job.stages]


def describe(plan: Plan, store: Store) -> str:
    """One line a stage: what is done, what would run and for how long, by records of the same stages or as the protocol expects."""
    lines, seconds, unknown = [], 0.0, 0
    seen: set[str] = set()
    for label, row, stage in _stages(plan):
        if (name := spec_id(stage)) in seen:
            continue
        seen.add(name)
        state, cost = "done", ""
        if store.here.latest(stage) is None:
            state = (
                "failed before, would run again"
                if store.here.latest(stage, status="failed")
                else "would run"
            )
            expected = _expected_seconds(stage, row, plan, store)
            unknown += expected is None
            seconds += expected or 0
            cost = "" if expected is None else f"about {duration(expected)}"
        lines.append(f"{name}  {kind_of(stage):8}  {label:34}  {state}  {cost}".rstrip())
    known, rest = (
        f"about {duration(seconds)} of {'GPU' if plan.device == 'cuda' else 'process'} time",
        f"{unknown} stage{'s' * (unknown != 1)} of unknown length",
    )
    return "\n".join(
        [
            *lines,
            "total: "
            + (rest if unknown and not seconds else f"{known}, and {rest}" if unknown else known),
        ]
    )


def _stages(plan: Plan) -> Iterator[tuple[str, str, Stage]]:
    """(label, row, stage)."""
    if isinstance(plan, Chosen):
        for row in plan.networks:
            yield from ((row.label, row.label, stage) for stage in cost_stages(row))
    else:
        yield from ((stage.backbone.name, "", stage) for stage in plan.costs)
    for job in (*plan.timings(), *plan.trainings()):
        yield from ((job.label, job.row, stage) for stage in job.stages)


def _expected_seconds(stage: Stage, row: str, plan: Plan, store: Store) -> float | None:
    for source in (store.here, store.reference):
        if (record := source.latest(stage)) and (
            isinstance(stage, Cost) or _on_such_a_device(record, plan)
        ):
            return record.provenance["seconds"]
    if isinstance(stage, Train) and isinstance(plan, Chosen):
        if found := training_seconds(stage, plan.table.row(row), plan, store):
            return found[0]
        return (
            plan.protocol.cost_hours * 3600
            if plan.protocol.cost_hours and plan.device == "cpu"
            else None
        )
    if isinstance(plan, Listed) and (found := plan.seconds.get(spec_id(stage))):
        return found
    return 1.0 if isinstance(stage, Cost) else None


def training_seconds(
    train: Train, row: Row, chosen: Chosen, store: Store
) -> tuple[float, str] | None:
    """Expected seconds of one GPU (of one process on CPUs) for a training of a row's system, and where that is known from."""
    found = _recorded_training(train, chosen, store)
    if found is None and train == train_stage(row, chosen.protocol, train.seed):
        found = seconds_an_image(row, chosen, store)
    return found and (found[0] * train.recipe.steps * train.recipe.batch, found[1])


def seconds_an_image(row: Row, chosen: Chosen, store: Store) -> tuple[float, str] | None:
    """Expected seconds of one GPU (of one process on CPUs) for a training image of a row, and where that is known from.

    The row's own recorded training counts most, then other rows' of the table by the ratio of counted Gflops, then in
    the same way what Table 6 of the paper says. None where none of them is known.
    """
    for known in (_recorded, _published):
        if found := known(row, chosen, store):
            return found
        if ours := _macs(row, chosen, store):
            others = [
                (other, macs)
                for other in (*chosen.table.rows, *chosen.table.outside)
                if (macs := _macs(other, chosen, store))
            ]
            if scaled := [
                (found[0] * ours / macs, found[1], other.label)
                for other, macs in others
                if (found := known(other, chosen, store))
            ]:
                sources, labels = (
                    dict.fromkeys(part) for part in list(zip(*scaled, strict=True))[1:]
                )
                return statistics.median(
                    seconds for seconds, _, _ in scaled
                ), f"{', '.join(sources)} of {', '.join(labels)}, scaled by counted Gflops"
    return None


def _recorded(row: Row, chosen: Chosen, store: Store) -> tuple[float, str] | None:
    return _recorded_training(train_stage(row, chosen.protocol, chosen.seeds[0]), chosen, store)


def _on_such_a_device(record: Record, plan: Plan) -> bool:
    return (record.provenance["device"] == "cpu") == (plan.device == "cpu")


def _recorded_training(train: Train, chosen: Chosen, store: Store) -> tuple[float, str] | None:
    """From this training with whatever seed, on the kind of device that is planned with."""
    for source in (store.here, store.reference):
        for seed in (*chosen.seeds, *range(10)):
            record = source.latest(replace(train, seed=seed))
            if (
                record
                and _on_such_a_device(record, chosen)
                and (rate := record.values.get("images_per_s"))
            ):
                return record.provenance[
                    "world_size"
                ] / rate, f"recorded throughput on {record.provenance['device']}"
    return None


def _published(row: Row, chosen: Chosen, store: Store) -> tuple[float, str] | None:
    side, name = (
        FACTOR * chosen.protocol.data.size,
        re.split(r",| \(", row.label)[0],
    )  # without the steps and the guidance
    if chosen.device == "cpu" or not is_latent(chosen.protocol.data):
        return None
    if found := store.published("table6.csv", ("model", "resolution")).get(f"{name} {side}"):
        gpus, _, kind = found["gpus"].partition("x")
        images = int(found["training_steps"]) * int(found["global_batch_size"])
        return int(gpus) * float(
            found["training_hours"]
        ) * 3600 / images, f"the paper's training time on {kind} (Table 6)"
    return None


def _macs(row: Row, chosen: Chosen, store: Store) -> float | None:
    """Counted multiply-accumulates of the network as it is trained: none where that is another size than the counted one."""
    stages = cost_stages(row)
    if len(stages) != 1 or chosen.protocol.small or stages[0].size != chosen.protocol.data.size:
        return None
    record = store.here.latest(stages[0]) or store.reference.latest(stages[0])
    return record and record.values["macs_core"]


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )
