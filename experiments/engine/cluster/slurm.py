"""A plan on Slurm: which jobs it makes, what they cost, and how they are submitted and cancelled.

This module does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.cluster import client as scheduler
from experiments.engine.cluster.client import Submission
from experiments.engine.cluster.site import Site, load_site
from experiments.engine.cluster.submit import (
    Array,
    batch_script_text,
    require_plain_path,
    stage_ids,
    submit,
)
from experiments.engine.jobs.estimate import duration, training_seconds
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.memory import Share, amount, describe_parts, known_needs, memory_of
from experiments.engine.jobs.plan import Plan, TablePlan, missing
from experiments.engine.jobs.pool import available_cores, run_here
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.records.code import own_code
from experiments.engine.records.store import Store
from experiments.engine.records.tree import warn_without_commit
from experiments.engine.reporting.efficiency.memory import Key, Needs, Settings, Sharding
from experiments.engine.specs.spec import Train


def arrays(plan: Plan, store: Store) -> list[Array]:
    """Return the jobs that lack a record, grouped by the resources that they take.

    A training with its evaluations is one job. The timings of a network are another.

    Raises:
        ValueError: in one line, if a run cannot work with the site's resources.
    """
    jobs_with_sites: list[tuple[Site, Job]] = []
    for job in missing(plan.timings(), store):
        jobs_with_sites.append((load_site(job.row or job.label).alone(), job))
    for job in missing(plan.trainings(), store):
        site = load_site(job.row or job.label)
        _check(job, site, plan, store)
        jobs_with_sites.append((site, job))

    # Sites hold a dictionary and cannot be keys themselves.
    sites: list[Site] = []
    for site, _ in jobs_with_sites:
        if site not in sites:
            sites.append(site)
    return [
        Array(site, tuple(job for other, job in jobs_with_sites if other == site)) for site in sites
    ]


def _trainings(job: Job) -> list[Train]:
    return [stage for stage in job.stages if isinstance(stage, Train)]


def _expected_seconds(train: Train, job: Job, plan: Plan, store: Store) -> tuple[float, str] | None:
    """Return the seconds of a training on one GPU, and where they are known from."""
    if not isinstance(plan, TablePlan):
        return None
    row = plan.selection.table.row(job.row)
    return training_seconds(train, row, plan.selection, store)


def _check(job: Job, site: Site, plan: Plan, store: Store) -> None:
    """Raise ValueError if the processes do not divide a batch, or no checkpoint fits in a job."""
    for train in _trainings(job):
        if train.recipe.batch % site.world_size:
            raise ValueError(
                f"{job.label}: {site.nodes} nodes of {site.tasks} processes do not divide the "
                f"batch of {train.recipe.batch}; change nodes, gpus_per_node or tasks_per_node"
            )

        expected = _expected_seconds(train, job, plan, store)
        if expected is None:
            continue
        steps = min(site.checkpoint_every, train.recipe.steps)
        interval = expected[0] * steps / train.recipe.steps / site.world_size
        if interval > site.seconds - site.signal_seconds:
            raise ValueError(
                f"{job.label}: a time limit of {site.time} is shorter than one checkpoint "
                f"interval, about {duration(interval)} for {steps} steps; "
                "raise time or lower checkpoint_every"
            )


# ---- What would be submitted


@dataclass(frozen=True)
class _Cost:
    """The expected training time of a job."""

    # None if a training of the job has no known cost.
    hours: float | None
    # Where the cost is known from.
    sources: tuple[str, ...] = ()


def describe(plan: Plan, store: Store) -> str:
    """Return each array's batch script, and the GPU-hours and memory of each training."""
    folder = store.root.resolve() / "submissions" / "dico-YYYYMMDD-XXXXXXXX"
    unit = "GPU-hours" if plan.device == "cuda" else "process-hours"
    lines: list[str] = []
    costs: list[_Cost] = []
    known = known_needs(store)

    for array in arrays(plan, store):
        script = batch_script_text(array.site, folder, len(array.jobs))
        lines += ["", _title(array), *(f"    {line}".rstrip() for line in script.splitlines())]
        for job in array.jobs:
            if _trainings(job):
                costs.append(_training_cost(job, plan, store))
                lines.append(f"{job.label}: {_cost_text(costs[-1], unit)}")
                lines += _memory_lines(job, array.site, known)

    variables = scheduler.variables_for_sbatch()
    if variables:
        lines += ["", f"variables of this shell that override the text above: {variables}"]
    return "\n".join([*lines, "", _total(costs, unit)])


def _title(array: Array) -> str:
    labels = ", ".join(job.label for job in array.jobs)
    if len(array.jobs) == 1:
        return f"one job: {labels}"
    return f"an array of {len(array.jobs)} jobs: {labels}"


def _training_cost(job: Job, plan: Plan, store: Store) -> _Cost:
    seconds: list[float] = []
    sources: dict[str, None] = {}
    for train in _trainings(job):
        expected = _expected_seconds(train, job, plan, store)
        if expected is None:
            return _Cost(None)
        seconds.append(expected[0])
        sources[expected[1]] = None
    return _Cost(sum(seconds) / 3600, tuple(sources))


def _cost_text(cost: _Cost, unit: str) -> str:
    if cost.hours is None:
        return f"{unit} of training unknown"
    return f"about {_amount(cost.hours)} {unit} of training, by {', '.join(cost.sources)}"


def _memory_lines(job: Job, site: Site, known: Mapping[Key, Needs]) -> list[str]:
    """Return what each process of a job needs for its trainings."""
    sharding = Sharding.OPTIMISER if site.shard_optimizer else Sharding.NOTHING
    sharding = Sharding.ALL if site.fully_shard else sharding
    settings = Settings(site.world_size, sharding)
    share = Share(settings, site.micro_batch or None, site.recompute)
    lines = []
    for train in _trainings(job):
        found = memory_of(train, share, known)
        if found:
            parts, images = found
            lines.append(
                f"{job.label}: {amount(parts.total)} per process: {describe_parts(parts, images)}"
            )
    return lines


def _total(costs: Sequence[_Cost], unit: str) -> str:
    hours = sum(cost.hours for cost in costs if cost.hours is not None)
    unknown = sum(cost.hours is None for cost in costs)
    parts = []
    if hours:
        parts.append(f"{_amount(hours)} {unit} of training")
    if unknown:
        parts.append(f"{unknown} of unknown cost")
    return f"estimated: {' and '.join(parts) or 'no training'}; evaluations and timings come on top"


def _amount(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


# ---- Submission


def send(plan: Plan, store: Store, command: str) -> str:
    """Count on this machine, submit the rest, and return what was submitted.

    Args:
        command: the command line that the user typed, for the lines that say how to go on.
    """
    scheduler.require_slurm()
    require_plain_path(store.root)
    store.check_writable()
    warn_without_commit()
    wanted = arrays(plan, store)
    variables = scheduler.variables_for_sbatch()
    if variables:
        print(
            f"warning: these variables of the shell override the site file: {variables}",
            file=sys.stderr,
        )

    _count_here(plan, store)
    sent = submit(wanted, store, experiment_of(plan), **plan.resources)
    if not wanted:
        return f"every stage has its record; {command} --report prints the table"
    return "\n".join(
        [
            *(f"submitted job {submission.job}: {submission.label}" for submission in sent),
            *_not_sent([job for array in wanted for job in array.jobs], len(sent), store),
            f"watch:  {command} --status",
            f"cancel: {command} --cancel",
        ]
    )


def _count_here(plan: Plan, store: Store) -> None:
    counts = missing(plan.counts(), store)
    with ProgressDisplay(total=sum(len(job.stages) for job in counts)) as progress:
        if not run_here(counts, store.root, "cpu", 1, available_cores(), progress.notify):
            raise ValueError("a count failed; nothing was submitted")


def _not_sent(jobs: Sequence[Job], num_sent: int, store: Store) -> list[str]:
    """Return lines on the jobs that were not submitted now, and why."""
    in_queue = scheduler.waiting_or_running(store.root, stage_ids(jobs))
    queued = {stage for submission in in_queue for stage in submission.stages}
    partly = [job.label for job in jobs if not set(stage_ids([job])) <= queued]

    lines = []
    already = len(jobs) - num_sent - len(partly)
    if already:
        lines.append(f"{already} jobs are in the queue or running already")
    if partly:
        lines.append(
            f"not submitted, because another command's job runs a part of it: {', '.join(partly)}; "
            "run this command again once that job has ended"
        )
    return lines


def cancel(plan: Plan, store: Store) -> str:
    """Cancel what this command submitted from this results folder."""
    scheduler.require_slurm()
    stages = stage_ids([*plan.timings(), *plan.trainings()])
    cancelled: list[Submission] = scheduler.cancel(store.root, stages, experiment_of(plan))
    lines = [f"cancelled job {submission.job}: {submission.label}" for submission in cancelled]
    return "\n".join(lines) or "no job of this command is in the queue"


def experiment_of(plan: Plan) -> str:
    """Return the script of this process with its table and protocol.

    --cancel ends only what the same experiment submitted, even if another table has the same runs.
    """
    script, study = Path(sys.argv[0]).name, own_code().study
    if study:
        script = f"{script} {study.path}"
    if isinstance(plan, TablePlan):
        selection = plan.selection
        return f"{script} --table {selection.table.number} --protocol {selection.protocol.name}"
    return script
