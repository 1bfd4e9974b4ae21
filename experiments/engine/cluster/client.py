"""Slurm's own commands, each with a time-out, and the ledger of what was submitted.

Standard library only. `sacct` is not needed.
"""

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

from experiments.engine.machine.environment import read_number, read_variable
from experiments.engine.runtime.heartbeat import queue_id

TIMEOUT = 60  # seconds for one command of Slurm
COMMANDS = ("sbatch", "squeue", "srun", "scancel")

# States of a job that the scheduler has finished with.
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

# Id, state, reason, name and comment of a job, on one line of squeue. Tabs separate them, since
# names and comments may hold any printable character.
QUEUE_FORMAT = "%i\t%T\t%r\t%j\t%k"


@dataclass(frozen=True)
class Submission:
    """A job that was submitted from a results folder, as its ledger keeps it."""

    # Ids of the job's stages.
    stages: tuple[str, ...]
    label: str
    # The scheduler's id.
    job: str
    # The scheduler's name, which the jobs of one array share.
    name: str
    # Path of the log: relative to the results folder, or absolute.
    log: str
    # Whether a command of this suite submitted it. A batch script's job only shows in --status.
    ours: bool = True
    # The command that submitted it, and may cancel it.
    experiment: str = ""


@dataclass(frozen=True)
class Queued:
    """What the queue says of a job."""

    name: str
    state: str
    reason: str
    # Batch scripts of this suite put the id of their run here.
    comment: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER


# ---- Commands of Slurm


def require_slurm() -> None:
    """Raise ValueError in one line if Slurm's commands are not on this machine."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        raise ValueError(
            f"no Slurm on this machine ({', '.join(absent)} not found); "
            "run on a login node of the cluster, or with --cluster here"
        )


def client(*command: str) -> str:
    """Return the output of one of Slurm's commands.

    Raises:
        ValueError: with the command's own message if it fails, or if it does not answer in time.
    """
    try:
        # Names of jobs may be in any encoding.
        process = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]} did not answer within {TIMEOUT} s; is the Slurm controller up?"
        ) from None
    if process.returncode:
        raise ValueError(f"{command[0]}: {one_line(process.stderr)}")
    return process.stdout


def one_line(complaint: str) -> str:
    """Return a Slurm command's complaint on one line, without the command's name."""
    parts = []
    for line in complaint.splitlines():
        text = line.strip()
        message = text.partition("error: ")[2] or text
        if message and message not in parts:
            parts.append(message)
    return "; ".join(parts) or "it failed without a message"


def variables_for_sbatch() -> str:
    """Return the SBATCH_ variables of this shell, which override a batch script's own options."""
    names = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    variables = {name: read_variable(name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in variables.items() if value)


def queue() -> dict[str, Queued]:
    """Return what the queue says of each of this user's jobs, by job id.

    A job that ended stays visible for as long as the controller remembers it.
    """
    listing = client("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", QUEUE_FORMAT)
    jobs = {}
    for line in listing.splitlines():
        fields = line.strip(" ").split("\t")
        # A line break in the comment of some other job gives lines of other lengths.
        if len(fields) == 5:
            job, state, reason, name, comment = fields
            jobs[job] = Queued(name, state, reason, comment)
    return jobs


def find_in_queue(submission: Submission, jobs: dict[str, Queued]) -> Queued | None:
    """Return what the queue says of a submission. Ids come again, but not under the same name."""
    queued = jobs.get(submission.job)
    return queued if queued and queued.name == submission.name else None


# ---- What was submitted


def ledger(root: Path) -> Path:
    """Return the path of the list of what was submitted from a results folder."""
    return root / "submissions" / "jobs.jsonl"


def remember(root: Path, submissions: Iterable[Submission]) -> None:
    """Add submissions to the ledger."""
    with open(ledger(root), "a") as file:
        file.writelines(json.dumps(asdict(submission)) + "\n" for submission in submissions)


def remember_this_job(root: Path, label: str, stages: Iterable[str]) -> None:
    """Add the Slurm job that this process belongs to, once. Outside of a job do nothing."""
    job = queue_id()
    if job is None or read_number("SLURM_PROCID"):
        return

    # A job that this suite submitted, or that was requeued, is in the ledger already.
    stage_ids = tuple(stages)
    if any(submission.job == job for submission in submitted(root, stage_ids)):
        return

    ledger(root).parent.mkdir(parents=True, exist_ok=True)
    name = read_variable("SLURM_JOB_NAME") or ""
    log = read_variable("DICO_LOG") or ""
    remember(root, [Submission(stage_ids, label, job, name, log, ours=False)])


def submitted(root: Path, stages: Iterable[str]) -> list[Submission]:
    """Return what was submitted for any of these stages, oldest first."""
    wanted = set(stages)
    submissions = []
    with suppress(FileNotFoundError):
        for line in ledger(root).read_text().splitlines():
            # A full disk may have cut a line.
            with suppress(ValueError, TypeError, KeyError):
                fields = json.loads(line)
                submission = Submission(**fields | {"stages": tuple(fields["stages"])})
                if wanted & set(submission.stages):
                    submissions.append(submission)
    return submissions


def waiting_or_running(root: Path, stages: Iterable[str]) -> list[Submission]:
    """Return the jobs for any of these stages that are in the queue, oldest first."""
    submissions = submitted(root, stages)
    if not submissions:
        return []
    jobs = queue()
    return [submission for submission in submissions if _lives(find_in_queue(submission, jobs))]


def _lives(queued: Queued | None) -> bool:
    return queued is not None and not queued.over


def cancel(root: Path, stages: Iterable[str], experiment: str) -> list[Submission]:
    """Cancel the jobs that this experiment submitted for these stages, and return them."""
    submissions = [
        submission
        for submission in waiting_or_running(root, stages)
        if submission.ours and submission.experiment == experiment
    ]
    if not submissions:
        return []

    try:
        client("scancel", *(submission.job for submission in submissions))
    except ValueError:
        # scancel also complains of a job that has just ended; then the others are cancelled.
        if _any_lives(submissions):
            raise
    return submissions


def _any_lives(submissions: Iterable[Submission]) -> bool:
    """Return whether any of these jobs still waits or runs."""
    jobs = queue()
    for submission in submissions:
        queued = find_in_queue(submission, jobs)
        if queued and not queued.over and queued.state != "COMPLETING":
            return True
    return False
