"""Signals that ask a job to stop. They set a flag; the run stops at its next step.

SIGUSR2 means: save and go back into the queue. A scheduler sends it before a time limit or a
preemption. SIGTERM means: save and exit, unless the scheduler meant a requeue. Local runs do not
listen, so both signals keep their usual meaning there. Standard library only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from enum import IntEnum

from experiments.engine.runtime.heartbeat import job_id, queue_id

TRY_AGAIN = 75  # exit status of a job that was stopped and can go on (EX_TEMPFAIL)
LOST = 137  # exit status of a killed process: the job should be restarted

_IS_RUNNING = re.compile(r"\bJobState=RUNNING\b|\bReason=TimeLimit\b")


class StopRequest(IntEnum):
    """Whether a run should stop, and what happens to its job then. The largest request wins."""

    NONE = 0
    # Save and exit.
    STOP = 1
    # Save and go back into the queue.
    REQUEUE = 2
    # Exit without saving: another job writes to this run now.
    TAKEN_OVER = 3

    @property
    def reason(self) -> str:
        """Why the run stops, for the heartbeat and the list of attempts."""
        return _REASONS[self]


_REASONS = {
    StopRequest.NONE: "not asked to stop",
    StopRequest.STOP: "asked to stop (SIGTERM)",
    StopRequest.REQUEUE: "asked to make room (SIGUSR2)",
    StopRequest.TAKEN_OVER: "another job took this run over",
}


class Preempted(Exception):
    """The run stops before its end. Unless it was taken over, it has saved."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(request.reason)
        self.request = request


class StopSignals:
    """Remembers the strongest request that a signal made of this process."""

    def __init__(self) -> None:
        self.request = StopRequest.NONE

    def listen(self) -> None:
        """Note SIGUSR2 and SIGTERM from now on, instead of dying of them."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, _: object) -> None:
        request = StopRequest.REQUEUE if number == signal.SIGUSR2 else StopRequest.STOP
        self.request = max(self.request, request)


SIGNALS = StopSignals()  # signals reach a process, so a process has one of these


def listen() -> None:
    """Note stop signals from now on. Call it early: until then a signal kills the process."""
    SIGNALS.listen()


def requested_stop() -> StopRequest:
    """Return the strongest request so far: NONE, STOP or REQUEUE."""
    return SIGNALS.request


def resolve_stop(request: StopRequest) -> StopRequest:
    """Return what a request means for this job: STOP or REQUEUE, whichever signal it was.

    A scheduler that sends no SIGUSR2 also sends SIGTERM to make room or at the time limit. A job
    that should make room may have been cancelled since. So the scheduler's state of the job
    decides: a running job goes back into the queue, a cancelled or already queued job stops.
    """
    if request not in (StopRequest.STOP, StopRequest.REQUEUE):
        return request
    name = queue_id()
    if name is None:
        return request

    # Without an answer the signal is all that is known.
    with suppress(OSError, subprocess.TimeoutExpired):
        shown = _scontrol("-o", "show", "job", name, timeout=20).stdout
        if "JobState=" in shown:
            return StopRequest.REQUEUE if _IS_RUNNING.search(shown) else StopRequest.STOP
    return request


def yield_to_terminations() -> None:
    """Let SIGTERM end this process again: the job has saved, and need not be killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def requeue(patience: float = 120.0, pause: float = 5.0) -> str | None:
    """Put this job back into the queue.

    Args:
        patience: Seconds of trying again, since the scheduler may be restarting.
        pause: Seconds between two tries.

    Returns:
        None, or the scheduler's last refusal.
    """
    end = time.monotonic() + patience
    refusal = _try_to_requeue()
    while refusal and time.monotonic() < end:
        time.sleep(pause)
        refusal = _try_to_requeue()
    return refusal


def _try_to_requeue() -> str | None:
    name = queue_id()
    assert name is not None, "only a scheduler's job can be requeued"
    try:
        result = _scontrol("requeue", name, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol: {error}"
    if result.returncode == 0:
        return None
    return result.stderr.strip() or f"scontrol ended with status {result.returncode}"


def _scontrol(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def wait_for_the_end(seconds: float = 60.0) -> None:
    """Wait for the scheduler to end this process.

    A process that exits first could make the scheduler count the job as finished.
    """
    time.sleep(seconds)


def in_a_job() -> bool:
    """Return whether a scheduler, or a launcher of several processes, started this process."""
    return job_id() is not None or "RANK" in os.environ
