"""How the jobs of a plan fare, told by records, heartbeats and Slurm's queue. No torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from experiments.engine.cluster import client as scheduler
from experiments.engine.cluster.client import Queued, Submission, find_in_queue
from experiments.engine.cluster.submit import stage_ids
from experiments.engine.jobs.estimate import duration
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.plan import Plan
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.store import Record, Store, timestamp
from experiments.engine.runtime import heartbeat
from experiments.engine.specs.spec import Evaluate, Train, kind_of, spec_id

LOG_LINES = 5  # of a failed job, that --status prints
LOG_TAIL_BYTES = 8192
UNKNOWN_QUEUE = "the queue is unknown, and running jobs are told by their heartbeats"


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUBMITTED = "submitted"  # Slurm does not answer whether it waits or runs
    NOT_SUBMITTED = "not submitted"


@dataclass(frozen=True)
class JobStatus:
    """The state of one job, with what is known about it."""

    state: State
    detail: str = ""
    log: Path | None = None


@dataclass(frozen=True)
class _Queue:
    """What Slurm's queue holds for this user; `jobs` is None if it cannot be read."""

    jobs: dict[str, Queued] | None
    # What the user is told if the queue cannot be read.
    warning: str = ""


def status(plan: Plan, store: Store) -> str:
    """Return one line per job. Under a failed job stand the last lines of its log."""
    all_jobs = (*plan.counts(), *plan.timings(), *plan.trainings())
    jobs = [job for job in all_jobs if job.stages]
    submissions = scheduler.submitted(store.root, stage_ids(jobs))
    newest = {stage: submission for submission in submissions for stage in submission.stages}
    queue = _read_queue(bool(submissions))

    lines = [queue.warning] if queue.warning else []
    for job in jobs:
        own = [newest[stage] for stage in stage_ids([job]) if stage in newest]
        lines += _lines(job, job_status(job, store, own[0] if own else None, queue.jobs))
    return "\n".join(lines)


def _read_queue(anything_submitted: bool) -> _Queue:
    if shutil.which("squeue") is None:
        warning = f"squeue is not on this machine: {UNKNOWN_QUEUE}"
        return _Queue(None, warning if anything_submitted else "")
    try:
        return _Queue(scheduler.queue())
    except ValueError as error:
        return _Queue(None, f"{error}: {UNKNOWN_QUEUE}")


def _lines(job: Job, found: JobStatus) -> list[str]:
    name = spec_id(job.stages[0])
    kind = "" if job.label == "counts" else kind_of(job.stages[0])
    lines = [f"{name}  {kind:8}  {job.label:34}  {found.state:13}  {found.detail}".rstrip()]
    if found.state is State.FAILED and found.log:
        lines += [f"    | {line}" for line in _last_lines(found.log)]
    return lines


def job_status(
    job: Job, store: Store, submission: Submission | None, jobs: dict[str, Queued] | None
) -> JobStatus:
    """Return the state of a job.

    Args:
        submission: the newest submission of one of the job's stages.
        jobs: Slurm's queue; None if it cannot be read.
    """
    left = job.left(store).stages
    if not left:
        return JobStatus(State.DONE)
    beat = _newest_heartbeat(job, store)
    queued = find_in_queue(submission, jobs) if submission and jobs else None
    log = store.root / submission.log if submission else None

    # Signs of life come first: the queue's, then the heartbeat's.
    if submission and queued and not queued.over:
        return _in_queue(job, submission, queued, beat)
    if beat and heartbeat.is_live(beat):
        return JobStatus(State.RUNNING, f"{_progress(beat, job)} (on {beat['host']})")

    # A failure counts until a later attempt dies without a record.
    failures = [store.here.latest(stage, status="failed") for stage in left]
    failure = next((record for record in reversed(failures) if record), None)
    if failure and not _died_since(beat, failure):
        return JobStatus(State.FAILED, f"{failure.kind} {failure.error} ({failure.utc})", log)

    if submission is None:
        return _batch_script_status(job, store, jobs or {})
    if jobs is None:
        return JobStatus(State.SUBMITTED, f"job {submission.job}")
    return _ended(submission, queued, beat, log)


def _in_queue(
    job: Job, submission: Submission, queued: Queued, beat: dict[str, Any] | None
) -> JobStatus:
    """Return the state of a job that Slurm has not finished with."""
    name = f"job {submission.job}"
    if queued.state in ("RUNNING", "COMPLETING"):
        progress = _progress(beat, job) if beat and heartbeat.is_live(beat) else "starting"
        return JobStatus(State.RUNNING, f"{progress} ({name})")
    reached = f", at {_progress(beat, job)}" if beat and beat.get("step") else ""
    detail = f"{queued.state.lower()}: {queued.reason} ({name}{reached})"
    return JobStatus(State.WAITING, detail)


def _ended(
    submission: Submission, queued: Queued | None, beat: dict[str, Any] | None, log: Path | None
) -> JobStatus:
    """Return the state of a submitted job that left the queue without finishing its stages."""
    reason = beat.get("reason") if beat else None
    last_heard = f"; last heard of: {reason}" if reason else ""
    name = f"job {submission.job}"
    if queued and queued.state == "CANCELLED":
        return JobStatus(State.CANCELLED, name + last_heard)
    ending = queued.state.lower() if queued else "its job left the queue"
    return JobStatus(State.FAILED, f"{ending} without a record ({name}){last_heard}", log)


def _batch_script_status(job: Job, store: Store, jobs: dict[str, Queued]) -> JobStatus:
    """Return the state of a run that a script under slurm/ has queued, but that has not started.

    Such a job is not in the ledger before Python starts. Its comment is the id of its training.
    """
    ids = stage_ids([job])
    own = [
        (number, queued)
        for number, queued in jobs.items()
        if queued.comment in ids and queued.state not in ("COMPLETED", "CANCELLED")
    ]
    if not own:
        return JobStatus(State.NOT_SUBMITTED)
    number, queued = own[-1]
    state = State.FAILED if queued.over else State.WAITING
    detail = f"{queued.state.lower()}: {queued.reason} (job {number}, by a batch script)"
    return JobStatus(state, detail, store.root / batch_script_log(queued.name, number))


def batch_script_log(name: str, number: str) -> str:
    """Return the log's name, as the headers of slurm/*.sh have it: --output=slurm-%x-%j.log."""
    return f"slurm-{name}-{number}.log"


def _newest_heartbeat(job: Job, store: Store) -> dict[str, Any] | None:
    folders = [store.run_dir(stage) for stage in job.stages if isinstance(stage, Train | Evaluate)]
    beats = [beat for folder in folders if (beat := heartbeat.read_heartbeat(folder))]
    return min(beats, key=lambda beat: beat["age"], default=None)


def _died_since(beat: dict[str, Any] | None, failure: Record) -> bool:
    """Return whether a later attempt than the failed one died without a last heartbeat."""
    if beat is None or beat.get("state") not in heartbeat.LIVE_STATES:
        return False
    return timestamp(beat["updated"]) > failure.utc


def _progress(beat: dict[str, Any], job: Job) -> str:
    """Return state, step, rate and time left as a heartbeat has them."""
    step, steps, rate = beat.get("step"), beat.get("steps"), beat.get("images_per_s")
    parts = [beat["state"]]
    if steps:
        parts.append(f"step {step} of {steps}")
    if rate:
        parts.append(f"{rate:.0f} images/s")

    # A training tells its rate, an evaluation its time.
    train = next((stage for stage in job.stages if isinstance(stage, Train)), None)
    if train and steps and rate and step < steps:
        parts.append(f"{duration((steps - step) * train.recipe.batch / rate)} left")
    elif beat.get("seconds_left"):
        parts.append(f"{duration(beat['seconds_left'])} left")
    return ", ".join(parts)


def _last_lines(log: Path) -> list[str]:
    """Return the last lines of a log that are not empty."""
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ["its log is not there"]
    except OSError as error:
        return [explain(error, "read", log)]
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
