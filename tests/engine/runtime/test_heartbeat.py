"""The sign of life of a run, and who may work on it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine.machine.system_errors import explain
from experiments.engine.records.files import take_lock
from experiments.engine.runtime import heartbeat, pieces
from experiments.engine.runtime.heartbeat import (
    STALE_AFTER,
    Heartbeat,
    RunState,
    claim_run,
    is_live,
    read_heartbeat,
)
from tests.support.heartbeats import heartbeat_in, leave_heartbeat


def refuse_to_open(patch: pytest.MonkeyPatch, module: Any, number: int) -> list[str]:
    """Let `open` in a module fail for heartbeats; return the paths that were refused."""
    refused: list[str] = []

    def refuse(path: Path, *mode: str) -> Any:
        if path.name != "heartbeat.json":
            return open(path, *mode)
        refused.append(str(path))
        raise OSError(number, os.strerror(number), os.fspath(path))

    patch.setattr(module, "open", refuse, raising=False)
    return refused


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one of job 42."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")


def test_it_says_who_works_where_and_how_far(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    with claim_run(tmp_path, world_size=4) as beat:
        started = heartbeat_in(tmp_path)
        expected = {
            "state": "starting",
            "job_id": "42",
            "attempt": 3,
            "world_size": 4,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        assert expected.items() <= started.items()

        # The thread writes what changes.
        beat.update(state=RunState.TRAINING, step=8, steps=9)
        while heartbeat_in(tmp_path)["step"] != 8:
            time.sleep(0.001)
        while heartbeat_in(tmp_path)["updated"] == started["updated"]:
            time.sleep(0.001)
        current = heartbeat_in(tmp_path)
        assert is_live(current) and current["age"] < STALE_AFTER

        beat.end(RunState.FAILED, "why")
    last = heartbeat_in(tmp_path)
    assert (last["state"], last["reason"]) == ("failed", "why")
    assert not is_live(last)


def test_an_interrupted_run_says_so(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), claim_run(tmp_path):
        raise KeyboardInterrupt
    last = heartbeat_in(tmp_path)
    assert (last["state"], last["reason"]) == ("stopped", "interrupted")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"updated": "now"}'])
def test_a_broken_heartbeat_is_none(text: str, tmp_path: Path):
    (tmp_path / "heartbeat.json").write_text(text)
    assert read_heartbeat(tmp_path) is None
    assert not is_live(None)
    assert read_heartbeat(tmp_path / "nowhere") is None


NUMBERS = [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTDIR, errno.ENOENT]


@pytest.mark.parametrize("number", NUMBERS)
def test_only_a_heartbeat_that_is_not_there_is_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A heartbeat that cannot be read is an error, and nobody takes the run over."""
    leave_heartbeat(tmp_path)
    refuse_to_open(monkeypatch, heartbeat, number)
    if number == errno.ENOENT:
        assert read_heartbeat(tmp_path) is None
        return

    # The error names the file.
    with pytest.raises(OSError) as failure:
        read_heartbeat(tmp_path)
    assert explain(failure.value).startswith(f"cannot read {tmp_path / 'heartbeat.json'}: ")
    with pytest.raises(OSError), claim_run(tmp_path):
        pass
    monkeypatch.undo()
    assert heartbeat_in(tmp_path)["owner"] == "other"


def test_a_heartbeat_that_cannot_be_read_for_a_while_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    with claim_run(tmp_path) as beat:
        with monkeypatch.context() as patch:
            refused = refuse_to_open(patch, heartbeat, errno.EIO)
            beat.update(state=RunState.TRAINING, step=3)
            while len(refused) < 3:
                time.sleep(0.001)
        while heartbeat_in(tmp_path)["step"] != 3:
            time.sleep(0.001)
    assert heartbeat_in(tmp_path)["state"] == "stopped"


@pytest.mark.parametrize("number", NUMBERS)
def test_only_a_piece_that_is_not_there_is_computed_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A piece that cannot be read is an error, and is not replaced."""
    (tmp_path / "000000.npz").touch()

    def refuse(path: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), os.fspath(path))

    # A missing piece is none.
    monkeypatch.setattr(pieces.np, "load", refuse)
    if number == errno.ENOENT:
        assert pieces._read(tmp_path, 0) is None
        return
    with pytest.raises(OSError) as failure:
        pieces._read(tmp_path, 0)
    assert explain(failure.value).startswith(f"cannot read {tmp_path / '000000.npz'}: ")


@pytest.mark.parametrize("content", [b"", b"no", b"PK\3\4", None, b"\x93NUMPY"])
def test_a_damaged_piece_is_computed_again(content: bytes | None, tmp_path: Path):
    pieces._keep(tmp_path, 0, {"a": np.arange(3)})
    whole = (tmp_path / "000000.npz").read_bytes()
    again = pieces._read(tmp_path, 0)
    assert again is not None and again["a"].tolist() == [0, 1, 2]
    (tmp_path / "000000.npz").write_bytes(whole[:-30] if content is None else content)
    assert pieces._read(tmp_path, 0) is None


@pytest.mark.parametrize("skew", [0.0, -2 * STALE_AFTER, 2 * STALE_AFTER])
def test_a_live_job_on_another_host_keeps_its_run_whatever_its_clock_says(
    skew: float, tmp_path: Path, job: None
):
    leave_heartbeat(tmp_path, updated=time.time() + skew)
    message = f"^run {tmp_path.name} is being worked on by job 41 on elsewhere"
    with pytest.raises(ValueError, match=message) as refusal, claim_run(tmp_path):
        pass
    assert "\n" not in str(refusal.value)
    assert heartbeat_in(tmp_path)["owner"] == "other"


@pytest.mark.parametrize(
    "changes",
    [
        dict(age=2 * STALE_AFTER),
        dict(age=2 * STALE_AFTER, updated=time.time() + 2 * STALE_AFTER),
        dict(job_id="42"),
        dict(state="failed"),
        dict(state="requeued"),
    ],
    ids=["stale", "stale with a fast clock", "own job", "failed", "requeued"],
)
def test_a_stale_a_finished_and_an_own_heartbeat_are_taken_over(
    changes: dict[str, Any], tmp_path: Path, job: None
):
    leave_heartbeat(tmp_path, **changes)
    with claim_run(tmp_path) as beat:
        assert heartbeat_in(tmp_path)["owner"] == beat.fields["owner"]
        assert beat.previous is not None and beat.previous["owner"] == "other"


def hold_run(folder: Path, job_id: str, held: Any, release: Any) -> None:
    os.environ["SLURM_JOB_ID"] = job_id
    with claim_run(folder):
        held.set()
        release.wait()


def hold_lock_silently(folder: Path, held: Any, release: Any) -> None:
    with open(folder / "lock", "wb") as file:
        take_lock(file, wait=False)
        held.set()
        release.wait()


@contextmanager
def holder_of(target: Any, *arguments: Any) -> Iterator[Any]:
    """Run a process that holds something until this context ends, and yield it."""
    context = multiprocessing.get_context("forkserver")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=target, args=(*arguments, held, release))
    holder.start()
    held.wait()
    try:
        yield holder
    finally:
        if holder.is_alive():
            release.set()
        holder.join()


def test_another_job_on_the_same_host_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, job: None
):
    with holder_of(hold_run, tmp_path, "41") as holder:
        message = f"by job 41 on {socket.gethostname()}"
        with pytest.raises(ValueError, match=message), claim_run(tmp_path):
            pass
        holder.kill()
        holder.join()

        # Its last heartbeat is fresh, and yet the system knows that it is dead.
        assert is_live(heartbeat_in(tmp_path))
        with claim_run(tmp_path) as beat:
            assert beat.previous is not None and beat.previous["job_id"] == "41"


def test_a_lock_whose_holder_is_silent_is_taken_over(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    with holder_of(hold_lock_silently, tmp_path) as holder:
        leave_heartbeat(tmp_path, age=2 * STALE_AFTER)
        monkeypatch.setattr(heartbeat, "STALE_AFTER", 0.5)
        with claim_run(tmp_path) as beat:
            assert holder.is_alive()
            assert heartbeat_in(tmp_path)["owner"] == beat.fields["owner"]


def test_two_processes_of_one_job_take_turns(tmp_path: Path):
    """Who asks for a run that is claimed waits until it is released."""
    order: list[int] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with claim_run(tmp_path):
            order.append(2)

    # The second one asks while the first one holds the run.
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
    # The other job writes again and again: one heartbeat can be overwritten before it is read.
    while beat.taken_over is None:
        leave_heartbeat(tmp_path)
        time.sleep(0.02)
    beat.end(RunState.DONE)
    assert beat.taken_over["job_id"] == "41"
    assert heartbeat_in(tmp_path)["owner"] == "other"
