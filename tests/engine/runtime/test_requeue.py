"""A job of one process that is asked to stop: back into the queue, or to an end with a reason."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.runtime import preemption
from experiments.engine.runtime.group import Group
from experiments.engine.runtime.heartbeat import read_heartbeat
from experiments.engine.runtime.preemption import TRY_AGAIN
from experiments.engine.specs.spec import spec_id
from tests.support.groups import (
    BOUND,
    TRAIN,
    Fault,
    FaultKind,
    Work,
    finished_record,
    newest_record,
    read_curve,
    run_group,
    run_member,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a training that nobody stopped."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_group(1, Work(root)) == [0]
    return root


def write_scontrol(folder: Path, script: str) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}")
    (folder / "scontrol").chmod(0o755)


def work_as_job(folder: Path, kind: FaultKind) -> None:
    """Train as job 7, whose scheduler is the script in the folder."""
    os.environ |= {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}
    requeue: Any = preemption.requeue
    requeue.__defaults__ = (0.0, 0.0)
    run_member(Group(), 0, Work(folder, fault=Fault(kind, 0, 6)))


def end_of_job(folder: Path, kind: FaultKind) -> int | None:
    """Run a job that is asked to stop, and return its exit status."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work_as_job, args=(folder, kind))
    process.start()
    process.join(BOUND)
    return process.exitcode


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        pytest.param(FaultKind.REQUEUE, "", id="SIGUSR2"),
        pytest.param(
            FaultKind.STOP,
            "JobState=RUNNING",
            id="SIGTERM of a running job",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_job_goes_back_into_the_queue_and_resumes_to_the_same_weights(
    kind: FaultKind, state: str, undisturbed: Path, tmp_path: Path
):
    # The scheduler ends a job that it requeues by SIGTERM, as Slurm does.
    heartbeat = tmp_path / "runs" / spec_id(TRAIN) / "heartbeat.json"
    write_scontrol(
        tmp_path,
        f'[ "$1" = -o ] && {{ echo "{state}"; exit; }}\n'
        f"cp {heartbeat} {tmp_path}/then\n"
        f'echo "$@" > {tmp_path}/asked\n'
        "kill -TERM $PPID\n",
    )
    assert end_of_job(tmp_path, kind) == -signal.SIGTERM
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert json.loads((tmp_path / "then").read_text())["state"] == "requeued"
    assert newest_record(tmp_path) is None

    assert run_group(1, Work(tmp_path)) == [0]
    values = finished_record(tmp_path).values
    assert values["resumed_at"] == 7
    assert values["weights_sha256"] == finished_record(undisturbed).values["weights_sha256"]
    assert read_curve(tmp_path) == read_curve(undisturbed)


@pytest.mark.parametrize(
    ("kind", "state", "reason"),
    [
        (FaultKind.REQUEUE, "RUNNING", "the job could not be requeued: no job 7"),
        (FaultKind.REQUEUE, "COMPLETING", "asked to make room (SIGUSR2), and to end"),
        (FaultKind.STOP, "COMPLETING", "asked to stop (SIGTERM)"),
    ],
)
def test_a_job_that_does_not_go_back_ends_with_the_reason(
    kind: FaultKind, state: str, reason: str, tmp_path: Path
):
    write_scontrol(
        tmp_path,
        f'[ "$1" = requeue ] && {{ echo "no job 7" >&2; exit 1; }}\necho "JobState={state}"\n',
    )
    assert end_of_job(tmp_path, kind) == TRY_AGAIN
    heartbeat = read_heartbeat(tmp_path / "runs" / spec_id(TRAIN))
    assert heartbeat is not None
    assert heartbeat["state"] == "stopped" and heartbeat["reason"].endswith(reason)
    assert newest_record(tmp_path) is None


def test_an_element_of_an_array_asks_for_itself_until_the_controller_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request names the element, and is repeated while the controller does not answer."""
    asked = tmp_path / "asked"
    refusal = 'echo "Unable to contact slurm controller" >&2; exit 1'
    write_scontrol(
        tmp_path, f'echo "$@" >> {asked}\n[ $(wc -l < {asked}) -ge 3 ] || {{ {refusal}; }}\n'
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")

    # The third request is answered.
    assert preemption.requeue(patience=0.0) == "Unable to contact slurm controller"
    assert preemption.requeue(pause=0.0) is None
    assert asked.read_text() == "requeue 7_1\n" * 3
