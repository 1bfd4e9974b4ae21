"""Requests to stop: what signals ask for, what the scheduler means, and the way into the queue."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.engine.runtime import preemption
from experiments.engine.runtime.preemption import StopRequest, requeue, resolve_stop


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one of job 42."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the scheduler's client, where a test writes a script."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


@pytest.fixture
def signals() -> Iterator[None]:
    """Gives signals and requests back as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    preemption.SIGNALS.request = StopRequest.NONE
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_noted_and_a_requeue_wins(signals: None):
    preemption.listen()
    assert preemption.requested_stop() == StopRequest.NONE
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested_stop() == StopRequest.STOP
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested_stop() == StopRequest.REQUEUE


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        # Inside the grace time of a preemption.
        ("JobState=RUNNING Reason=None", StopRequest.REQUEUE),
        ("JobState=COMPLETING Reason=TimeLimit", StopRequest.REQUEUE),
        ("JobState=CANCELLED Reason=None", StopRequest.STOP),
        # It is requeued already.
        ("JobState=COMPLETING Reason=None Restarts=1", StopRequest.STOP),
    ],
)
def test_a_signal_means_what_the_scheduler_says(
    state: str, expected: StopRequest, scontrol: Path, job: None
):
    answer = f'echo "JobId=42 {state} Restarts=0"'
    scontrol.write_text(f'#!/bin/sh\n[ "$*" = "-o show job 42" ] && {answer}\n')
    assert resolve_stop(StopRequest.STOP) == expected
    assert resolve_stop(StopRequest.REQUEUE) == expected
    assert resolve_stop(StopRequest.TAKEN_OVER) == StopRequest.TAKEN_OVER


def test_a_signal_means_what_it_says_without_a_scheduler(
    job: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    assert resolve_stop(StopRequest.STOP) == StopRequest.STOP
    assert resolve_stop(StopRequest.REQUEUE) == StopRequest.REQUEUE


def test_without_the_schedulers_client_a_requeue_is_refused(
    job: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    assert "scontrol" in (requeue(patience=0) or "")


def test_a_refused_requeue_gives_the_schedulers_message(
    scontrol: Path, job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refusal = '{ echo "slurm_requeue error: Invalid job id" >&2; exit 1; }'
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n[ "$2" = 42 ] || {refusal}\n')
    assert requeue() is None
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert requeue(patience=0) == "slurm_requeue error: Invalid job id"
