"""A run's sign of life and its lock: who works on it and how far it is. Standard library only.

`heartbeat.json` in a run's folder holds the state (starting, training, evaluating, saving; at the end requeued, stopped,
done or failed), step, steps, images_per_s, seconds_left (of an evaluation), loss, updated (unix seconds by the writer's clock),
host, pid, job_id, attempt, world_size, reason and owner (one random name an attempt). Its age is told by the file system's clock alone: nodes' differ.
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
from pathlib import Path
from typing import Any

from experiments.engine.records.files import take_lock, written_whole

INTERVAL, STALE_AFTER = (
    5.0,
    60.0,
)  # seconds between two signs of life, and without one until a process counts as dead
LIVE_STATES = ("starting", "training", "evaluating", "saving")


def job_id() -> str | None:
    """The scheduler's id of the job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def queue_id() -> str | None:
    """What the scheduler's clients call this job: the last element of an array has the id of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return job_id()


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat of a run, with its `age` in seconds when it was read, or None."""
    found = _read(folder)
    return found and found | {"age": _now(folder) - found["written"]}


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        with open(
            folder / "heartbeat.json", "rb"
        ) as file:  # a network file system looks again when a file is opened
            found, written = json.loads(file.read()), os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError):
        return None
    return (
        found | {"written": written}
        if isinstance(found, dict) and isinstance(found.get("updated"), int | float)
        else None
    )


def _now(folder: Path) -> float:
    """The time by the clock that stamps the folder's files; this machine's where none can be written."""
    probe = folder / f".clock.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
    except OSError:
        return time.time()


def is_live(beat: dict[str, Any] | None) -> bool:
    """Whether the process that wrote it worked, and had been heard of lately, when it was read."""
    return beat is not None and beat.get("state") in LIVE_STATES and beat["age"] < STALE_AFTER


class Heartbeat:
    """Writes the file every few seconds from a thread of its own; `before` is what it found, `taken_over` who replaced it."""

    def __init__(self, folder: Path, world_size: int = 1) -> None:
        self.folder, self.before, self.taken_over = folder, read_heartbeat(folder), None
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
        self.fields: dict[str, Any] = dict(
            state="starting",
            step=None,
            steps=None,
            images_per_s=None,
            loss=None,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.fields |= dict(
            job_id=job_id(),
            attempt=attempt,
            world_size=world_size,
            reason=None,
            owner=uuid.uuid4().hex,
        )
        self._changed, self._ended, self._written = threading.Event(), False, False
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._write()
        self._thread.start()

    def tell(self, **changes: Any) -> None:
        """Change fields; a new state is written at once, by the thread, so that nobody waits for the file system."""
        urgent = changes.get("state", self.fields["state"]) != self.fields["state"]
        self.fields |= changes
        if urgent:
            self._changed.set()

    def end(self, state: str, reason: str | None = None) -> None:
        """Write the last state and stop; only the first call does anything."""
        if self._ended:
            return
        self._ended = True
        self._changed.set()
        self._thread.join()
        self.fields |= dict(state=state, reason=reason)
        self._write()

    def correct(self, state: str, reason: str) -> None:
        """Write another last state after `end`."""
        self.fields |= dict(state=state, reason=reason)
        self._write()

    def _beat(self) -> None:
        while not self._ended:
            self._changed.wait(INTERVAL)
            self._changed.clear()
            if not self._ended:
                self._write()

    def _write(self) -> None:
        there = _read(self.folder)
        if self._written and there and there.get("owner") != self.fields["owner"]:
            self.taken_over = there
        if self.taken_over:
            return
        self.fields["updated"] = time.time()
        with suppress(OSError):  # on a full disk the run itself says so
            with written_whole(self.folder / "heartbeat.json") as file:
                file.write(json.dumps(self.fields).encode())
            self._written = True


@contextmanager
def claim_run(folder: Path, world_size: int = 1) -> Iterator[Heartbeat]:
    """Hold a run's folder and its heartbeat.

    A process of the same job, or of none on the same host, is waited for; ValueError in one line where another live job
    has the run. On one host the kernel's file lock decides, which a dead process frees at once; across hosts, where not
    every file system shares such locks, the heartbeat decides, and one that is stale is taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = read_heartbeat(folder)
    if (
        is_live(there)
        and there.get("host") != socket.gethostname()
        and (job_id() is None or there.get("job_id") != job_id())
    ):
        raise ValueError(_refusal(folder, there))
    with open(folder / "lock", "wb") as file:
        heard = time.monotonic()
        while not take_lock(file, wait=False) and time.monotonic() - heard < STALE_AFTER:
            if is_live(there := read_heartbeat(folder)):
                if there.get("job_id") != job_id():
                    raise ValueError(_refusal(folder, there))
                heard = time.monotonic()
            time.sleep(0.1)
        beat = Heartbeat(folder, world_size)
        try:
            yield beat
        finally:
            beat.end("stopped", "interrupted")


def _refusal(folder: Path, there: dict[str, Any]) -> str:
    job = f"job {there['job_id']}" if there.get("job_id") else f"process {there.get('pid')}"
    return f"run {folder.name} is being worked on by {job} on {there.get('host')} ({there.get('state')}, heard of {there['age']:.0f} s ago); wait for it or end it first"


# Every attempt at a run, in `attempts.json` of its folder: where it started, how far it came and why it ended. Standard library only.
ATTEMPT_LIMIT = 5  # attempts of one job that may start at the same step


def begin_attempt(beat: Heartbeat, step: int) -> None:
    """Note that an attempt starts at `step`; one that was killed is closed with what its heartbeat, or its checkpoint, said last.

    Raises ValueError in one line when too many attempts of this job made no step that was kept: restarting has no end else.
    """
    attempts = read_attempts(beat.folder)
    if attempts and attempts[-1]["end"] is None:
        last = beat.before or {}
        attempts[-1] |= {
            "end": max(last.get("step") or 0, attempts[-1]["start"], step),
            "reason": last.get("reason") or "killed",
        }
    same = 0
    for attempt in reversed(attempts):
        if beat.fields["job_id"] is None or (attempt["job_id"], attempt["start"]) != (
            beat.fields["job_id"],
            step,
        ):
            break
        same += 1
    if same >= ATTEMPT_LIMIT:
        _write_attempts(beat.folder, attempts)
        raise ValueError(
            f"{same} attempts of job {beat.fields['job_id']} started at step {step} and kept no later one; the last ended: {attempts[-1]['reason']}"
        )
    who = {name: beat.fields[name] for name in ("job_id", "host", "world_size")}
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    _write_attempts(
        beat.folder,
        [*attempts, {"start": step, "end": None, "reason": None, "started": started, **who}],
    )


def end_attempt(folder: Path, step: int, reason: str) -> None:
    """Close the attempt that is open, if there is one."""
    attempts = read_attempts(folder)
    if attempts and attempts[-1]["end"] is None:
        attempts[-1] |= {"end": step, "reason": reason}
        with suppress(OSError):  # on a full disk the next attempt closes it
            _write_attempts(folder, attempts)


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """All attempts so far, oldest first."""
    try:
        return json.loads((folder / "attempts.json").read_bytes())
    except (OSError, ValueError):
        return []


def _write_attempts(folder: Path, attempts: list[dict[str, Any]]) -> None:
    with written_whole(folder / "attempts.json") as file:
        file.write(json.dumps(attempts, indent=1).encode())
