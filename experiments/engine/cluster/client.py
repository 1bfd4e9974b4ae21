"""Slurm's clients, each bounded by a time-out, and what was submitted to it. Standard library only; sacct is not needed."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.engine.runtime.heartbeat import queue_id

TIMEOUT = 60
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Submission:
    """A job in the queue: its stages by id, its scheduler's id, the name that it shares with its array, and its log.

    `ours` is one that an experiment's command submitted, and `experiment` which; others are batch scripts of their own, which only show.
    """

    stages: tuple[str, ...]
    label: str
    job: str
    name: str
    log: str
    ours: bool = True
    experiment: str = ""


@dataclass(frozen=True)
class Queued:
    """What the queue says of a job."""

    name: str
    state: str
    reason: str

    @property
    def over(self) -> bool:
        return self.state in OVER


def require_slurm() -> None:
    """Raise ValueError in one line where Slurm's clients are not on this machine."""
    if absent := [
        name for name in ("sbatch", "squeue", "srun", "scancel") if shutil.which(name) is None
    ]:
        raise ValueError(
            f"no Slurm on this machine ({', '.join(absent)} not found); run on a login node of the cluster, or with --cluster here"
        )


def client(*command: str) -> str:
    """The output of one of Slurm's clients; ValueError with its own words where it refuses or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]} did not answer within {TIMEOUT} s; is the Slurm controller up?"
        ) from None
    if done.returncode:
        raise ValueError(f"{command[0]}: {words(done.stderr)}")
    return done.stdout


def set_for_sbatch() -> str:
    """The variables of this shell that sbatch puts before a batch script's own options."""
    return ", ".join(
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("SBATCH_")
    )


def words(text: str) -> str:
    """A client's complaint on one line, each part without the client's own name."""
    lines = (line.strip() for line in text.splitlines())
    return (
        "; ".join(dict.fromkeys(line.partition("error: ")[2] or line for line in lines if line))
        or "it failed without a word"
    )


def queue(names: Iterable[str]) -> dict[str, Queued]:
    """What the queue says of each job of these names, by id, as long as the controller remembers it."""
    if not (wanted := ",".join(sorted(set(names)))):
        return {}
    found = {}
    for line in client(
        "squeue",
        "-h",
        "-r",
        "-t",
        "all",
        "-u",
        getpass.getuser(),
        f"--name={wanted}",
        "-o",
        "%i|%T|%r|%j",
    ).splitlines():
        job, state, reason, name = line.strip().split("|", 3)
        found[job] = Queued(name, state, reason)
    return found


def ledger(root: Path) -> Path:
    return root / "submissions" / "jobs.jsonl"


def remember(root: Path, submissions: Iterable[Submission]) -> None:
    """Add to what was submitted from this results folder."""
    with open(ledger(root), "a") as file:
        file.writelines(json.dumps(asdict(submission)) + "\n" for submission in submissions)


def remember_this_job(root: Path, label: str, stages: Iterable[str]) -> None:
    """Add the job that this process belongs to, once, whoever submitted it; nothing outside of one."""
    job, stages = queue_id(), tuple(stages)
    if (
        job is None
        or os.environ.get("SLURM_PROCID", "0") != "0"
        or any(there.job == job for there in submitted(root, stages))
    ):
        return
    ledger(root).parent.mkdir(parents=True, exist_ok=True)
    remember(
        root,
        [
            Submission(
                stages,
                label,
                job,
                os.environ.get("SLURM_JOB_NAME", ""),
                os.environ.get("DICO_LOG", ""),
                ours=False,
            )
        ],
    )


def submitted(root: Path, stages: Iterable[str]) -> list[Submission]:
    """What was submitted for any of these stages, oldest first."""
    wanted, found = set(stages), []
    with suppress(FileNotFoundError):
        for line in ledger(root).read_text().splitlines():
            with suppress(ValueError, TypeError):  # a line that a full disk cut
                submission = Submission(**json.loads(line))
                if wanted & set(submission.stages):
                    found.append(submission)
    return found


def waiting_or_running(root: Path, stages: Iterable[str]) -> list[Submission]:
    """The jobs for any of these stages that are in the queue, oldest first."""
    there = submitted(root, stages)
    states = queue(submission.name for submission in there)
    return [
        submission
        for submission in there
        if submission.job in states and not states[submission.job].over
    ]


def cancel(root: Path, stages: Iterable[str], experiment: str) -> list[Submission]:
    """End the jobs that this experiment's command submitted for these stages from this folder, and no other; returns them."""
    entries = [
        submission
        for submission in waiting_or_running(root, stages)
        if submission.ours and submission.experiment == experiment
    ]
    if entries:
        try:
            client("scancel", *(submission.job for submission in entries))
        except ValueError:  # one has ended since; the others are cancelled all the same
            states = queue(submission.name for submission in entries)
            if any(
                job in states and not states[job].over and states[job].state != "COMPLETING"
                for job in (one.job for one in entries)
            ):
                raise
    return entries
