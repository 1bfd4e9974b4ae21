"""The list of attempts at a run."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from experiments.engine.runtime.attempts import (
    ATTEMPT_LIMIT,
    begin_attempt,
    end_attempt,
    read_attempts,
)
from experiments.engine.runtime.heartbeat import claim_run
from tests.support.heartbeats import leave_heartbeat

OPEN_ATTEMPT = dict(start=0, end=None, reason=None, job_id="41", host="elsewhere", world_size=1)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one of job 42."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder in which an attempt was killed. Its last heartbeat was of step 7."""
    leave_heartbeat(tmp_path, state="stopped", reason=None)
    (tmp_path / "attempts.json").write_text(json.dumps([OPEN_ATTEMPT]))
    return tmp_path


def test_a_killed_attempt_is_closed_from_its_heartbeat(killed: Path, job: None):
    """The next attempt closes it at the step of its last heartbeat."""
    with claim_run(killed, world_size=2) as heartbeat:
        begin_attempt(heartbeat, 5)
        end_attempt(killed, 9, "done")
    first, second = read_attempts(killed)
    assert (first["start"], first["end"], first["reason"]) == (0, 7, "killed")

    # The next attempt says where it ran.
    expected = {
        "start": 5,
        "end": 9,
        "reason": "done",
        "job_id": "42",
        "host": socket.gethostname(),
        "world_size": 2,
    }
    assert expected.items() <= second.items()


def test_a_killed_attempt_came_at_least_as_far_as_its_checkpoint(killed: Path, job: None):
    with claim_run(killed) as heartbeat:
        begin_attempt(heartbeat, 10)  # it was saved after the last heartbeat, of step 7
    first, second = read_attempts(killed)
    assert (first["end"], second["start"]) == (10, 10)


def test_restarts_without_progress_come_to_an_end(
    tmp_path: Path, job: None, monkeypatch: pytest.MonkeyPatch
):
    def attempt(step: int) -> None:
        with claim_run(tmp_path) as heartbeat:
            begin_attempt(heartbeat, step)

    # Progress starts the count again.
    for step in (0, 0, 0, 0, *[5] * ATTEMPT_LIMIT):
        attempt(step)
    message = "^5 attempts of job 42 started at step 5 and kept no later one; the last ended: "
    with pytest.raises(ValueError, match=message) as refusal:
        attempt(5)
    assert "\n" not in str(refusal.value)

    # Another job may try again, and who works without a scheduler may try for ever.
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    attempt(5)
    monkeypatch.delenv("SLURM_JOB_ID")
    for _ in range(ATTEMPT_LIMIT + 2):
        attempt(5)
