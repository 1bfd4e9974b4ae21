"""The sign of life of a run, its lock, its attempts, and the way back into the queue."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.records.files import take_lock
from experiments.engine.runtime import attempts, heartbeat, preemption
from experiments.engine.runtime.heartbeat import (
    STALE_AFTER,
    Heartbeat,
    claim_run,
    is_live,
    read_heartbeat,
)
from experiments.engine.runtime.preemption import StopRequest

NOW = dict(
    state="training", step=7, host="elsewhere", job_id="41", owner="other", reason=None, pid=5
)


def leave(folder: Path, age: float = 0.0, **changes: Any) -> None:
    """A heartbeat that another process wrote `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heartbeat.json").write_text(json.dumps(NOW | dict(updated=time.time()) | changes))
    os.utime(folder / "heartbeat.json", (time.time() - age,) * 2)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")


def test_it_says_who_works_where_and_how_far(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    with claim_run(tmp_path, world_size=4) as beat:
        started = read_heartbeat(tmp_path)
        assert {
            "state": "starting",
            "job_id": "42",
            "attempt": 3,
            "world_size": 4,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }.items() <= started.items()
        beat.update(state="training", step=8, steps=9)
        while (
            read_heartbeat(tmp_path)["step"] != 8
            or read_heartbeat(tmp_path)["updated"] == started["updated"]
        ):
            pass
        assert is_live(read_heartbeat(tmp_path)) and read_heartbeat(tmp_path)["age"] < STALE_AFTER
        beat.end("failed", "why")
    assert (read_heartbeat(tmp_path)["state"], read_heartbeat(tmp_path)["reason"]) == (
        "failed",
        "why",
    ) and not is_live(read_heartbeat(tmp_path))
    with pytest.raises(KeyboardInterrupt), claim_run(tmp_path):
        raise KeyboardInterrupt
    assert (read_heartbeat(tmp_path)["state"], read_heartbeat(tmp_path)["reason"]) == (
        "stopped",
        "interrupted",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"updated": "now"}'])
def test_a_broken_heartbeat_is_none(text: str, tmp_path: Path):
    (tmp_path / "heartbeat.json").write_text(text)
    assert (
        read_heartbeat(tmp_path) is None
        and not is_live(read_heartbeat(tmp_path))
        and read_heartbeat(tmp_path / "nowhere") is None
    )


@pytest.mark.parametrize("skew", [0.0, -2 * STALE_AFTER, 2 * STALE_AFTER])
def test_a_live_job_on_another_host_keeps_its_run_whatever_its_clock_says(
    skew: float, tmp_path: Path, job: None
):
    leave(tmp_path, updated=time.time() + skew)
    with (
        pytest.raises(
            ValueError, match=f"^run {tmp_path.name} is being worked on by job 41 on elsewhere"
        ) as refusal,
        claim_run(tmp_path),
    ):
        pass
    assert "\n" not in str(refusal.value) and read_heartbeat(tmp_path)["owner"] == "other"


@pytest.mark.parametrize(
    "changes",
    [
        dict(age=2 * STALE_AFTER),
        dict(age=2 * STALE_AFTER, updated=time.time() + 2 * STALE_AFTER),
        dict(job_id="42"),
        dict(state="failed"),
        dict(state="requeued"),
    ],
)
def test_a_stale_or_finished_one_and_its_own_are_taken_over(
    changes: dict[str, Any], tmp_path: Path, job: None
):
    leave(tmp_path, **changes)
    with claim_run(tmp_path) as beat:
        assert (
            read_heartbeat(tmp_path)["owner"] == beat.fields["owner"]
            and beat.previous["owner"] == "other"
        )


def hold(folder: Path, number: str, held: Any, release: Any) -> None:
    os.environ["SLURM_JOB_ID"] = number
    with claim_run(folder):
        held.set()
        release.wait()


def test_another_job_on_the_same_host_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, job: None
):
    context = multiprocessing.get_context("forkserver")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, "41", held, release))
    holder.start()
    held.wait()
    with (
        pytest.raises(ValueError, match=f"by job 41 on {socket.gethostname()}"),
        claim_run(tmp_path),
    ):
        pass
    holder.kill()
    holder.join()
    assert is_live(
        read_heartbeat(tmp_path)
    )  # its last words are fresh, and yet the system knows that it is dead
    with claim_run(tmp_path) as beat:
        assert beat.previous["job_id"] == "41"


def fall_silent(folder: Path, held: Any, release: Any) -> None:
    with open(folder / "lock", "wb") as file:
        take_lock(file, wait=False)
        held.set()
        release.wait()


def test_a_lock_whose_holder_is_silent_is_taken_over(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    context = multiprocessing.get_context("forkserver")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=fall_silent, args=(tmp_path, held, release))
    holder.start()
    held.wait()
    leave(tmp_path, age=2 * STALE_AFTER)
    monkeypatch.setattr(heartbeat, "STALE_AFTER", 1.0)
    with claim_run(tmp_path) as beat:
        assert holder.is_alive() and read_heartbeat(tmp_path)["owner"] == beat.fields["owner"]
    release.set()
    holder.join()


def test_two_processes_of_one_job_take_turns(tmp_path: Path):
    order: list[int] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with claim_run(tmp_path):
            order.append(2)

    other = threading.Thread(target=second)
    other.start()
    with claim_run(tmp_path):
        inside.set()
        order.append(1)
    other.join()
    assert order == [1, 2]


def test_a_job_that_was_replaced_notices_and_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    beat = Heartbeat(tmp_path)
    leave(tmp_path)
    while not beat.taken_over:
        pass
    beat.end("done")
    assert beat.taken_over["job_id"] == "41" and read_heartbeat(tmp_path)["owner"] == "other"


def test_attempts_are_listed_and_a_killed_one_is_closed_from_its_heartbeat(
    tmp_path: Path, job: None
):
    leave(tmp_path, state="stopped", reason=None)
    (tmp_path / "attempts.json").write_text(
        json.dumps(
            [dict(start=0, end=None, reason=None, job_id="41", host="elsewhere", world_size=1)]
        )
    )
    with claim_run(tmp_path, world_size=2) as beat:
        attempts.begin_attempt(beat, 5)
        attempts.end_attempt(tmp_path, 9, "done")
    first, second = attempts.read_attempts(tmp_path)
    assert (first["start"], first["end"], first["reason"]) == (0, 7, "killed")
    assert {
        "start": 5,
        "end": 9,
        "reason": "done",
        "job_id": "42",
        "host": socket.gethostname(),
        "world_size": 2,
    }.items() <= second.items()


def test_a_killed_attempt_came_at_least_as_far_as_the_checkpoint_that_it_left(
    tmp_path: Path, job: None
):
    leave(tmp_path, state="stopped", reason=None)
    (tmp_path / "attempts.json").write_text(
        json.dumps(
            [dict(start=0, end=None, reason=None, job_id="41", host="elsewhere", world_size=1)]
        )
    )
    with claim_run(tmp_path) as beat:
        attempts.begin_attempt(beat, 10)  # saved after the last heartbeat, which said 7
    first, second = attempts.read_attempts(tmp_path)
    assert (first["end"], second["start"]) == (10, 10)


def test_restarts_without_progress_come_to_an_end(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    def attempt(step: int) -> None:
        with claim_run(tmp_path) as beat:
            attempts.begin_attempt(beat, step)

    for step in (0, 0, 0, 0, 5, 5, 5, 5, 5):
        attempt(step)
    with pytest.raises(
        ValueError,
        match="^5 attempts of job 42 started at step 5 and kept no later one; the last ended: ",
    ) as refusal:
        attempt(5)
    assert "\n" not in str(refusal.value)
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    attempt(5)
    monkeypatch.delenv("SLURM_JOB_ID")
    for _ in range(7):
        attempt(5)


@pytest.fixture
def signals() -> Any:
    """Gives the signals and the flag back as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    preemption.SIGNALS.request = StopRequest.NONE
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_set_a_flag_and_requeueing_wins(signals: None):
    preemption.listen()
    assert preemption.requested_stop() == StopRequest.NONE
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested_stop() == StopRequest.STOP
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested_stop() == StopRequest.REQUEUE


@pytest.mark.parametrize(
    "said, back",
    [
        ("JobState=RUNNING Reason=None", True),  # inside the grace time of a preemption
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=CANCELLED Reason=None", False),
        ("JobState=COMPLETING Reason=None Restarts=1", False),  # it is requeued already
    ],
)
def test_a_signal_means_what_the_scheduler_says(
    said: str, back: bool, tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\n[ "$*" = "-o show job 42" ] && echo "JobId=42 {said} Restarts=0"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [preemption.resolve_stop(how) for how in (StopRequest.STOP, StopRequest.REQUEUE)] == [
        StopRequest.REQUEUE if back else StopRequest.STOP
    ] * 2
    assert preemption.resolve_stop(StopRequest.TAKEN_OVER) == StopRequest.TAKEN_OVER
    monkeypatch.setenv("PATH", "")
    assert [preemption.resolve_stop(how) for how in (StopRequest.STOP, StopRequest.REQUEUE)] == [
        StopRequest.STOP,
        StopRequest.REQUEUE,
    ]


def test_a_refused_requeue_says_the_scheduler_s_words(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol" in preemption.requeue(patience=0)
    script = tmp_path / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n[ "$2" = 42 ] || {{ echo "slurm_requeue error: Invalid job id" >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    assert preemption.requeue() is None and (tmp_path / "asked").read_text() == "requeue 42\n"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert preemption.requeue(patience=0) == "slurm_requeue error: Invalid job id"
