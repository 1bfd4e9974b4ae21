"""A run's sign of life and its lock: who works on it, and how far it is. Standard library only.

`heartbeat.json` in a run's folder holds these fields:

    state         a RunState
    step, steps   how far the run is, and where it ends
    images_per_s  throughput since the attempt started
    seconds_left  of an evaluation
    loss          mean loss of the latest steps
    updated       unix time of the last change, by the writer's clock
    host, pid     where the process runs
    job_id        the scheduler's id, or null
    attempt       1 more than the scheduler's count of restarts
    world_size    how many processes share the run
    reason        why the run ended, or null
    owner         a random name, one for each attempt

Clocks of nodes differ, so only the file system's clock tells how old a heartbeat is.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from experiments.engine.machine.environment import read_number, read_variable
from experiments.engine.machine.system_errors import naming
from experiments.engine.records.files import say_who_holds, sign_lock, take_lock, written_whole

INTERVAL = 5.0  # seconds between two heartbeats
STALE_AFTER = 60.0  # seconds without a heartbeat after which a process counts as dead


class RunState(StrEnum):
    """What a run is doing, or how it ended."""

    STARTING = "starting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    REQUEUED = "requeued"
    STOPPED = "stopped"
    DONE = "done"
    FAILED = "failed"


LIVE_STATES = (RunState.STARTING, RunState.TRAINING, RunState.EVALUATING, RunState.SAVING)


def job_id() -> str | None:
    """Return the scheduler's id of the job that this process belongs to."""
    return read_variable("SLURM_JOB_ID")


def queue_id() -> str | None:
    """Return the name by which the scheduler's clients call this job.

    It differs from the id for the last element of an array, which has the id of the whole array.
    """
    array = read_variable("SLURM_ARRAY_JOB_ID")
    element = read_variable("SLURM_ARRAY_TASK_ID")
    if array is not None and element is not None:
        return f"{array}_{element}"
    return job_id()


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """Return the last heartbeat of a run and its `age` in seconds, or None.

    Raises:
        OSError: a heartbeat is there and cannot be read, so that nobody knows who works there.
    """
    fields = _read(folder)
    if fields is None:
        return None
    return fields | {"age": _now(folder) - fields["written"]}


def is_live(heartbeat: dict[str, Any] | None) -> bool:
    """Return whether the process behind a heartbeat was at work when the heartbeat was read."""
    if heartbeat is None:
        return False
    return heartbeat.get("state") in LIVE_STATES and heartbeat["age"] < STALE_AFTER


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the fields of a heartbeat and the time at which it was `written`, or None."""
    path = folder / "heartbeat.json"
    try:
        # Opening the file makes a network file system look again.
        with naming("read", path), open(path, "rb") as file:
            fields = json.loads(file.read())
            written = os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("updated"), int | float):
        return None
    return fields | {"written": written}


def _now(folder: Path) -> float:
    """Return the time by the clock that stamps files of a folder, or this machine's time."""
    probe = folder / f".clock.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
    except OSError:
        return time.time()


class Heartbeat:
    """Writes the file every few seconds from a thread of its own.

    Attributes:
        fields: What the file holds.
        previous: The heartbeat of an earlier attempt, or None.
        taken_over: The heartbeat of another process that replaced this one, or None.
    """

    def __init__(self, folder: Path, world_size: int = 1) -> None:
        self.folder = folder
        self.previous = read_heartbeat(folder)
        self.taken_over: dict[str, Any] | None = None
        # The order is fixed: slurm/job.sh looks for state and job_id in the text.
        self.fields: dict[str, Any] = dict(
            state=RunState.STARTING,
            step=None,
            steps=None,
            images_per_s=None,
            loss=None,
            host=socket.gethostname(),
            pid=os.getpid(),
            job_id=job_id(),
            attempt=(read_number("SLURM_RESTART_COUNT") or 0) + 1,
            world_size=world_size,
            reason=None,
            owner=uuid.uuid4().hex,
        )

        # The first heartbeat is on disk before anything else happens.
        self._changed = threading.Event()
        self._ended = False
        self._written = False
        self._thread = threading.Thread(target=self._write_until_the_end, daemon=True)
        self._write()
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Change fields.

        The thread writes a new state at once, and other changes with its next heartbeat, so that
        a training step never waits for the file system.
        """
        is_new_state = changes.get("state", self.fields["state"]) != self.fields["state"]
        self.fields |= changes
        if is_new_state:
            self._changed.set()

    def end(self, state: RunState, reason: str | None = None) -> None:
        """Write the last state and stop. Later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self._changed.set()
        self._thread.join()
        self.correct(state, reason)

    def correct(self, state: RunState, reason: str | None) -> None:
        """Write another last state after `end`."""
        self.fields |= dict(state=state, reason=reason)
        self._write()

    def _write_until_the_end(self) -> None:
        while not self._ended:
            self._changed.wait(INTERVAL)
            self._changed.clear()
            if not self._ended:
                self._write()

    def _write(self) -> None:
        # What cannot be read now may be another job's, and is read again with the next heartbeat.
        try:
            current = _read(self.folder)
        except OSError:
            return

        # A heartbeat of another owner means that another job works here now.
        if self._written and current and current.get("owner") != self.fields["owner"]:
            self.taken_over = current
        if self.taken_over:
            return

        # On a full disk the run itself fails, and says so.
        self.fields["updated"] = time.time()
        with suppress(OSError):
            with written_whole(self.folder / "heartbeat.json") as file:
                file.write(json.dumps(self.fields).encode())
            self._written = True


@contextmanager
def claim_run(folder: Path, world_size: int = 1) -> Iterator[Heartbeat]:
    """Hold a run's folder and its heartbeat.

    On one host the kernel's file lock decides, which a dead process frees at once. Not every file
    system shares such locks between hosts; there the heartbeat decides, and a stale one is taken
    over. A process of the same job, or of no job on the same host, is waited for.

    Raises:
        ValueError: Another live job has the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    current = read_heartbeat(folder)
    if current is not None and is_live(current) and _is_elsewhere(current):
        raise ValueError(_refusal(folder, current))

    with open(folder / "lock", "a+b") as file:
        # A holder that is silent for long is dead, or on a host that does not share the lock.
        heard = time.monotonic()
        told = False
        while not take_lock(file, wait=False) and time.monotonic() - heard < STALE_AFTER:
            current = read_heartbeat(folder)
            if current is not None and is_live(current):
                if current.get("job_id") != job_id():
                    raise ValueError(_refusal(folder, current))
                heard = time.monotonic()
            if not told:
                say_who_holds(folder / "lock")
                told = True
            time.sleep(0.1)

        sign_lock(file)
        heartbeat = Heartbeat(folder, world_size)
        try:
            yield heartbeat
        finally:
            heartbeat.end(RunState.STOPPED, "interrupted")


def _is_elsewhere(heartbeat: dict[str, Any]) -> bool:
    """Return whether a heartbeat is of another host, and not of this job."""
    if heartbeat.get("host") == socket.gethostname():
        return False
    return job_id() is None or heartbeat.get("job_id") != job_id()


def _refusal(folder: Path, current: dict[str, Any]) -> str:
    number = current.get("job_id")
    holder = f"job {number}" if number else f"process {current.get('pid')}"
    return (
        f"run {folder.name} is being worked on by {holder} on {current.get('host')} "
        f"({current.get('state')}, last heartbeat {current['age']:.0f} s ago); "
        "wait for it or end it first"
    )
