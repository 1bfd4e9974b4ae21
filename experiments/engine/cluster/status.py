"""A table's runs on Slurm: what is sent, with which resources and at what cost; how they fare; their end. No torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.engine.cluster import client as scheduler
from experiments.engine.cluster.site import FILE, Site, load_site
from experiments.engine.jobs.plan import Chosen, Plan, duration, missing, training_seconds
from experiments.engine.jobs.pool import Job, available_cores, run_here
from experiments.engine.jobs.progress import Progress
from experiments.engine.records.store import Record, Store, timestamp
from experiments.engine.runtime import heartbeat
from experiments.engine.specs.spec import Evaluate, Train, kind_of, spec_id


def groups(plan: Plan, store: Store) -> list[tuple[Site, list[Job]]]:
    """What lacks a record, by the resources that it takes: a training with its evaluations is a job, a timing is another.

    Raises ValueError in one line where a run cannot work with the site's resources.
    """
    found: dict[str, tuple[Site, list[Job]]] = {}
    for jobs, alone in ((plan.timings(), True), (plan.trainings(), False)):
        for job in missing(jobs, store):
            site = load_site(job.row or job.label)
            if not alone:
                _check(job, site, plan, store)
            site = site.alone() if alone else site
            found.setdefault(repr(site), (site, []))[1].append(job)
    return list(found.values())


def _trainings(job: Job) -> list[Train]:
    return [stage for stage in job.stages if isinstance(stage, Train)]


def _check(job: Job, site: Site, plan: Plan, store: Store) -> None:
    for train in _trainings(job):
        if train.recipe.batch % site.world_size:
            raise ValueError(
                f"{job.label}: {site.nodes} nodes of {site.tasks} processes do not divide the batch of {train.recipe.batch}; change nodes, gpus_per_node or tasks_per_node"
            )
        expected = training_seconds(train, plan.table.row(job.row), plan, store)
        if expected is None:
            continue
        steps = min(site.checkpoint_every, train.recipe.steps)
        interval = expected[0] * steps / train.recipe.steps / site.world_size
        if interval > site.seconds - site.signal_seconds:
            raise ValueError(
                f"{job.label}: a time limit of {site.time} is shorter than one checkpoint interval, about {duration(interval)} "
                f"for {steps} steps; raise time or lower checkpoint_every"
            )


def describe(plan: Plan, store: Store) -> str:
    """Resources, the batch script of each array, and the expected GPU-hours of each training: how many and by what, or unknown."""
    from experiments.engine.cluster.submit import sbatch_text

    folder, lines, total = store.root.resolve() / "submissions" / "dico-YYYYMMDD-XXXXXXXX", [], 0.0
    unknown, unit = 0, "GPU-hours" if plan.device == "cuda" else "process-hours"
    for site, jobs in groups(plan, store):
        lines += [
            "",
            f"an array of {len(jobs)} jobs: {', '.join(job.label for job in jobs)}"
            if len(jobs) > 1
            else f"one job: {jobs[0].label}",
        ]
        lines += [
            f"    {line}".rstrip() for line in sbatch_text(site, folder, len(jobs)).splitlines()
        ]
        for job in jobs:
            expected = [
                training_seconds(train, plan.table.row(job.row), plan, store)
                for train in _trainings(job)
            ]
            if None in expected:
                unknown += 1
                lines.append(f"{job.label}: {unit} of training unknown")
            elif expected:
                hours = sum(seconds for seconds, _ in expected) / 3600
                total += hours
                lines.append(
                    f"{job.label}: about {_amount(hours)} {unit} of training, by {', '.join(dict.fromkeys(source for _, source in expected))}"
                )
    if set_here := scheduler.set_for_sbatch():
        lines += ["", f"this shell sets what sbatch puts before the text above: {set_here}"]
    known = [f"{_amount(total)} {unit} of training"] if total else []
    more = [f"{unknown} of unknown cost"] if unknown else []
    return "\n".join(
        [
            *lines,
            "",
            f"estimated: {', and '.join(known + more) or 'no training'}; evaluations and timings come on top",
        ]
    )


def _amount(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def send(plan: Plan, store: Store, command: str) -> str:
    """Count here, submit the rest, and say what was submitted and how to watch it."""
    from experiments.engine.cluster.submit import submit

    scheduler.require_slurm()
    store.check_writable()
    wanted = groups(plan, store)
    if set_here := scheduler.set_for_sbatch():
        print(
            f"warning: sbatch puts what this shell sets before the site's: {set_here}",
            file=sys.stderr,
        )
    counts = missing(plan.counts(), store)
    with Progress(total=sum(len(job.stages) for job in counts)) as progress:
        if not run_here(counts, store.root, "cpu", 1, available_cores(), progress.notify):
            raise ValueError("a count failed; nothing was submitted")
    sent = submit(wanted, store, _experiment(plan), **plan.resources)
    lines = [f"submitted job {one.job}: {one.label}" for one in sent]
    there = {
        stage
        for one in scheduler.waiting_or_running(
            store.root, _ids(job for _, jobs in wanted for job in jobs)
        )
        for stage in one.stages
    }
    late = [job.label for _, jobs in wanted for job in jobs if not set(_ids([job])) <= there]
    if waiting := sum(len(jobs) for _, jobs in wanted) - len(sent) - len(late):
        lines.append(f"{waiting} jobs are in the queue or at work already")
    if late:
        lines.append(
            f"not submitted, as another command's job is at work on a part: {', '.join(late)}; call this again once that is done"
        )
    if not wanted:
        lines.append(f"every stage has its record; {command} --report prints the table")
    return "\n".join(
        [*lines, *([f"watch: {command} --status", f"end:   {command} --cancel"] if wanted else [])]
    )


def cancel(plan: Plan, store: Store) -> str:
    """End what was submitted for these jobs from this results folder."""
    scheduler.require_slurm()
    ended = scheduler.cancel(
        store.root, _ids((*plan.timings(), *plan.trainings())), _experiment(plan)
    )
    return (
        "\n".join(f"cancelled job {one.job}: {one.label}" for one in ended)
        or "nothing of this is in the queue"
    )


def _experiment(plan: Plan) -> str:
    """The script that this process runs, and its table: what --cancel may end, also where another table holds the same runs."""
    script = Path(sys.argv[0]).name
    return (
        f"{script} --table {plan.table.number} --protocol {plan.protocol.name}"
        if isinstance(plan, Chosen)
        else script
    )


def _ids(jobs: Iterable[Job]) -> list[str]:
    return [spec_id(stage) for job in jobs for stage in job.stages]


def status(plan: Plan, store: Store) -> str:
    """A line a job: waiting, running, done, failed, cancelled or not submitted; under a failed one the last lines of its log."""
    jobs = [job for job in (*plan.counts(), *plan.timings(), *plan.trainings()) if job.stages]
    there = scheduler.submitted(store.root, _ids(jobs))
    newest = {stage: one for one in there for stage in one.stages}
    names = _script_names(plan) if isinstance(plan, Chosen) else {}
    queued, lines = _asked([*(one.name for one in there), *names.values()])
    for job in jobs:
        name = spec_id(job.stages[0])
        submission = next(
            (newest[spec_id(stage)] for stage in job.stages if spec_id(stage) in newest), None
        )
        state, detail = _state(job, store, submission, queued)
        log = store.root / submission.log if submission else None
        if state == "not submitted" and (
            found := [
                (number, of)
                for number, of in (queued or {}).items()
                if of.name == names.get(job.label) and of.state not in ("COMPLETED", "CANCELLED")
            ]
        ):
            number, last = found[-1]
            state, log = (
                "failed" if last.over else "waiting",
                store.root / f"slurm-{last.name}-{number}.log",
            )  # as its header says
            detail = f"{last.state.lower()}: {last.reason} (job {number}, by the batch script of this name)"
        kind = "" if job.label == "counts" else kind_of(job.stages[0])
        lines.append(f"{name}  {kind:8}  {job.label:34}  {state:13}  {detail}".rstrip())
        if state == "failed" and log:
            lines += [f"    | {line}" for line in _last_lines(log)]
    return "\n".join(lines)


def _script_names(chosen: Chosen) -> dict[str, str]:
    """By label of a training, the name under which a script beside the site file queues it: it leaves no other trace until it starts."""
    found = {}
    for script in sorted(FILE.parent.glob("*.sh")):
        text = script.read_text()
        name, run = (
            re.search(r"--job-name=(\S+)", text),
            re.search(r"--table (\d+) --row (\S+) --protocol (\S+)", text),
        )
        if name and run and (int(run[1]), run[3]) == (chosen.table.number, chosen.protocol.name):
            found[f"{run[2]}, seed 0"] = name[1]
    return found


def _asked(names: list[str]) -> tuple[dict[str, scheduler.Queued] | None, list[str]]:
    """What the queue says, None where it cannot be asked, and a line that says so."""
    if shutil.which("squeue") is None:
        return None, [
            "squeue is not on this machine: what waits is unknown, what runs is told by its heartbeat"
        ] if names else []
    try:
        return scheduler.queue(names), []
    except ValueError as error:
        return None, [f"{error}: what waits is unknown, what runs is told by its heartbeat"]


def _state(
    job: Job,
    store: Store,
    submission: scheduler.Submission | None,
    queue: dict[str, scheduler.Queued] | None,
) -> tuple[str, str]:
    queued = (queue or {}).get(submission.job) if submission else None
    left = job.left(store).stages
    if not left:
        return "done", ""
    train = next((stage for stage in job.stages if isinstance(stage, Train)), None)
    beats = [
        heartbeat.read(store.run_dir(stage))
        for stage in job.stages
        if isinstance(stage, Train | Evaluate)
    ]
    beat = min(filter(None, beats), key=lambda beat: beat["age"], default=None)
    where = f"job {submission.job}" if submission else ""
    if queued and not queued.over:
        reached = f", at {_progress(beat, train)}" if beat and beat.get("step") else ""
        if queued.state in ("RUNNING", "COMPLETING"):
            return (
                "running",
                f"{_progress(beat, train) if beat and heartbeat.live(beat) else 'starting'} ({where})",
            )
        return "waiting", f"{queued.state.lower()}: {queued.reason} ({where}{reached})"
    if heartbeat.live(beat):
        return "running", f"{_progress(beat, train)} (on {beat['host']})"
    failed = [record for stage in left if (record := store.here.latest(stage, status="failed"))]
    died = (
        beat is not None and beat.get("state") in heartbeat.LIVE
    )  # without a word, and since the failure if there was one
    if failed and not (died and timestamp(beat["updated"]) > failed[-1].utc):
        return "failed", _reason(failed[-1])
    if submission and queue is None:
        return "submitted", where
    heard = f"; last heard of: {beat['reason']}" if beat and beat.get("reason") else ""
    if queued and queued.state == "CANCELLED":
        return "cancelled", where + heard
    if submission:
        return (
            "failed",
            f"{queued.state.lower() if queued else 'its job left the queue'} without a record ({where}){heard}",
        )
    return "not submitted", ""


def _progress(beat: dict[str, Any], train: Train) -> str:
    """State, step, rate and time left from a heartbeat."""
    text, step, steps, rate = (
        beat["state"],
        beat.get("step"),
        beat.get("steps"),
        beat.get("images_per_s"),
    )
    if steps:
        text += f", step {step} of {steps}"
    if rate:
        text += f", {rate:.0f} images/s"
    if train and steps and rate and step < steps:
        text += f", {duration((steps - step) * train.recipe.batch / rate)} left"
    elif beat.get("seconds_left"):
        text += f", {duration(beat['seconds_left'])} left"
    return text


def _reason(record: Record) -> str:
    return f"{record.kind} {record.error} ({record.utc})"


def _last_lines(log: Path, num: int = 5) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            return [
                line for line in file.read().decode(errors="replace").splitlines() if line.strip()
            ][-num:]
    except OSError:
        return ["its log is not there"]
