"""Signals that ask a job to stop: they set a flag, and the run stops at its next step. Standard library only.

USR2 (what a scheduler sends before a time limit or a preemption) means save and go back to the queue; TERM means save and
end, unless the scheduler that sent it means the former. Local runs, which an interrupt ends, keep the system's meaning of both.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress

from experiments.engine.runtime.heartbeat import job_id, queue_id

TRY_AGAIN, LOST = (
    75,
    137,
)  # exit status of a job that was stopped and can go on (EX_TEMPFAIL); and as if killed: restart it
NO, STOP, REQUEUE, TAKEN_OVER = range(4)
_REASONS = {
    STOP: "asked to stop (SIGTERM)",
    REQUEUE: "asked to make room (SIGUSR2)",
    TAKEN_OVER: "another job took this run over",
}
_asked = NO


class Preempted(Exception):
    """The run stops before its end: STOP and REQUEUE after it has saved, TAKEN_OVER without, as another job writes there now."""

    def __init__(self, how: int) -> None:
        super().__init__(_REASONS[how])
        self.how = how


def listen() -> None:
    """Note USR2 and TERM from now on instead of dying of them. The sooner a job calls this, the less a signal can hit."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, _note)
        signal.signal(signal.SIGTERM, _note)


def requested_stop() -> int:
    """What this process was asked so far: NO, STOP or REQUEUE."""
    return _asked


def resolve_stop(how: int) -> int:
    """What a request asks of this job: STOP or REQUEUE, whichever the signal was.

    TERM is also how a scheduler that sends no USR2 makes room or ends a job's time, and a job that was told to make room
    may be cancelled since. The job's state tells. A running one is to make room (in the grace time of a preemption), or
    hears a signal of its last attempt that came late; one that is cancelled, or in the queue again already, is to stop.
    """
    if how not in (STOP, REQUEUE) or job_id() is None:
        return how
    with suppress(OSError, subprocess.TimeoutExpired):
        shown = subprocess.run(
            ["scontrol", "-o", "show", "job", queue_id()],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
        if "JobState=" in shown:
            return (
                REQUEUE if re.search(r"\bJobState=RUNNING\b|\bReason=TimeLimit\b", shown) else STOP
            )
    return how


def yield_to_terminations() -> None:
    """Let TERM end this process again: the job has saved, and the scheduler should not have to wait to kill it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def requeue(patience: float = 120.0, pause: float = 5.0) -> str | None:
    """Put this job back into the queue; the scheduler's words if it still refuses after `patience` seconds: it may be restarting."""
    end = time.monotonic() + patience
    while (refusal := _ask_to_requeue()) and time.monotonic() < end:
        time.sleep(pause)
    return refusal


def _ask_to_requeue() -> str | None:
    try:
        done = subprocess.run(
            ["scontrol", "requeue", queue_id()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol: {error}"
    return (
        (done.stderr.strip() or f"scontrol ended with status {done.returncode}")
        if done.returncode
        else None
    )


def wait_for_the_end(seconds: float = 60.0) -> None:
    """Wait until the scheduler ends this process: leaving first could let it count the job as finished."""
    time.sleep(seconds)


def _note(number: int, _: object) -> None:
    global _asked
    _asked = max(_asked, REQUEUE if number == signal.SIGUSR2 else STOP)


def in_a_job() -> bool:
    """Whether a scheduler or a launcher of several processes started this one."""
    return job_id() is not None or "RANK" in os.environ
