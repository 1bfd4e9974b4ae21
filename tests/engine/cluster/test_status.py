"""What --status says of jobs. A script stands in for squeue."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import run
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.cluster import client as scheduler
from experiments.engine.cluster.client import Submission
from experiments.engine.cluster.status import status
from experiments.engine.cluster.submit import stage_ids
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.records.store import Store
from experiments.engine.runtime import heartbeat
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Stage
from tests.support.commands import write_programs
from tests.support.plans import two_rows

SCRIPT_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "dico_s"}
Queue = Callable[..., None]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Return a function that sets what squeue prints: a job per argument, its fields by commas.

    scancel writes its arguments to a file `cancelled` and complains that a job has ended.
    """
    write_programs(
        tmp_path / "bin",
        squeue=f"cat {tmp_path}/queue",
        scancel=f'echo "$@" >> {tmp_path}/cancelled\n'
        'echo "scancel: error: Invalid job id" >&2; exit 1',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    # The queue is empty at first.
    def set_queue(*jobs: str) -> None:
        lines = ["\t".join(job.split(",")) + "\n" for job in jobs]
        (tmp_path / "queue").write_text("".join(lines))

    set_queue()
    return set_queue


def main_run() -> TablePlan:
    """Return the run of slurm/dico_s.sh."""
    table = run.TABLES[1]
    return TablePlan(Selection(table, [table.row("DiCo-S")], IMAGENET256, [0], "cuda"))


def beat_of(store: Store, stage: Stage, **fields: object) -> heartbeat.Heartbeat:
    """Write the heartbeat of a process that did not end by itself."""
    folder = store.run_dir(stage)
    folder.mkdir(parents=True, exist_ok=True)
    beat = heartbeat.Heartbeat(folder)
    beat.update(**fields)
    beat.end(str(fields["state"]))
    return beat


# ---- Jobs of batch scripts


def test_a_batch_script_that_waits_is_known_by_its_comment(tmp_path: Path, queue: Queue):
    runs = main_run()
    train, *_ = stage_ids(runs.trainings())
    queue(f"7,PENDING,Priority,dico_s,{train}", "8,PENDING,None,other,(null)")
    line = r"DiCo-S, seed 0 +waiting +pending: Priority \(job 7, by a batch script\)"
    assert re.search(line, status(runs, Store(tmp_path)))


def test_a_batch_script_that_died_before_python_began_shows_its_log(tmp_path: Path, queue: Queue):
    runs = main_run()
    train, *_ = stage_ids(runs.trainings())
    queue(f"9,FAILED,NonZeroExitCode,dico_s,{train}")
    (tmp_path / "slurm-dico_s-9.log").write_text("no such module\n")
    lines = (
        r"failed +failed: NonZeroExitCode \(job 9, by a batch script\)\n"
        r" +\| no such module"
    )
    assert re.search(lines, status(runs, Store(tmp_path)))


def test_a_batch_script_that_runs_is_remembered_and_followed(
    tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
):
    store, runs = Store(tmp_path), main_run()
    stages = stage_ids(runs.trainings())
    for name, value in (SCRIPT_JOB | {"DICO_LOG": str(tmp_path / "log")}).items():
        monkeypatch.setenv(name, value)
    scheduler.remember_this_job(tmp_path, "DiCo-S, seed 0", stages)
    scheduler.remember_this_job(tmp_path, "DiCo-S, seed 0", stages)  # after a requeue
    assert len(scheduler.submitted(tmp_path, stages)) == 1

    queue("7,RUNNING,None,dico_s,")
    assert re.search(r"DiCo-S, seed 0 +running +starting \(job 7\)", status(runs, store))
    assert [job.job for job in scheduler.waiting_or_running(tmp_path, stages)] == ["7"]
    # A command cancels what it submitted, and no batch script.
    assert not scheduler.cancel(tmp_path, stages, "a.py")

    queue("7,FAILED,NonZeroExitCode,dico_s,")
    (tmp_path / "log").write_text("its last words\n")
    lines = r"failed +failed without a record \(job 7\)\n +\| its last words"
    assert re.search(lines, status(runs, store))
    queue("7,CANCELLED,None,dico_s,")
    assert re.search(r"DiCo-S, seed 0 +cancelled +job 7$", status(runs, store), re.M)
    # Another job that has the id now is not this one.
    queue("7,RUNNING,None,other,")
    assert re.search(r"failed +its job left the queue without a record", status(runs, store))


# ---- Jobs of commands


@pytest.fixture
def submitted(tmp_path: Path) -> list[str]:
    """Return the ids of two stages, which are in the ledger as an array that `a.py` submitted."""
    stages = stage_ids(main_run().trainings())
    scheduler.ledger(tmp_path).parent.mkdir()
    scheduler.remember(
        tmp_path,
        [
            Submission((stage,), "x", f"8_{k}", "dico-x", "log", experiment="a.py")
            for k, stage in enumerate(stages)
        ],
    )
    return stages


def test_a_job_that_ends_while_it_is_cancelled_is_no_error(
    tmp_path: Path, queue: Queue, submitted: list[str]
):
    queue("8_0,COMPLETING,None,dico-x,", "8_1,COMPLETING,None,dico-x,")
    assert [job.job for job in scheduler.cancel(tmp_path, submitted, "a.py")] == ["8_0", "8_1"]
    assert (tmp_path / "cancelled").read_text() == "8_0 8_1\n"


def test_a_job_that_cannot_be_cancelled_is_an_error(
    tmp_path: Path, queue: Queue, submitted: list[str]
):
    queue("8_0,RUNNING,None,dico-x,")
    # Another experiment, of which the same run is a part, has nothing to cancel.
    assert not scheduler.cancel(tmp_path, submitted, "b.py")
    with pytest.raises(ValueError, match="^scancel: Invalid job id$"):
        scheduler.cancel(tmp_path, submitted, "a.py")


def test_only_what_was_submitted_for_a_stage_is_found_again(tmp_path: Path):
    first, second = (
        Submission((name,), name, f"{number}_0", "dico-x", "log")
        for number, name in enumerate("ab")
    )
    scheduler.ledger(tmp_path).parent.mkdir()
    scheduler.remember(tmp_path, [first, second])
    with open(scheduler.ledger(tmp_path), "a") as file:
        file.write('{"cut')  # by a full disk
    assert [job.job for job in scheduler.submitted(tmp_path, ["b"])] == ["1_0"]


@pytest.mark.parametrize(
    "program, warning",
    [
        (
            "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1",
            "squeue: Unable to contact slurm controller: the queue is unknown",
        ),
        (None, "squeue is not on this machine: the queue is unknown"),
    ],
)
def test_a_queue_that_cannot_be_read_is_said(
    program: str | None, warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = two_rows(DIGITS, "cpu")
    train, *_ = stage_ids(runs.trainings())
    scheduler.ledger(tmp_path).parent.mkdir()
    scheduler.remember(tmp_path, [Submission((train,), "DiCo-S, seed 0", "8", "dico-x", "log")])
    write_programs(tmp_path / "bin", **({"squeue": program} if program else {}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    text = status(runs, Store(tmp_path))
    assert text.startswith(warning)
    assert re.search(r"DiCo-S, seed 0 +submitted +job 8$", text, re.M)


def test_a_scheduler_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_programs(tmp_path, squeue="exec sleep 100")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(scheduler, "TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(ValueError, match="squeue did not answer"):
        scheduler.queue()
    assert time.monotonic() - started < 50


# ---- Runs without a submission


def test_a_run_that_nobody_submitted_shows_by_its_heartbeat(tmp_path: Path):
    store, runs = Store(tmp_path), two_rows(DIGITS, "cpu")
    train, evaluation, _ = runs.trainings()[0].stages
    beat_of(store, train, state="training", step=100, steps=650, images_per_s=64.0)
    text = status(runs, store)
    progress = "training, step 100 of 650, 64 images/s, 9 min left"
    assert re.search(rf"train +DiCo-S, seed 0 +running +{progress}", text)
    assert re.search(r"train +GELU->ReLU, seed 0 +not submitted", text)

    beat_of(store, evaluation, state="evaluating", step=2, steps=9, seconds_left=600.0)
    progress = r"evaluating, step 2 of 9, 10 min left \(on"
    assert re.search(rf"train +DiCo-S, seed 0 +running +{progress}", status(runs, store))


def test_a_death_after_an_old_failure_is_what_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, runs = Store(tmp_path), two_rows(DIGITS, "cpu")
    train = runs.trainings()[0].stages[0]
    store.append(train, "failed", {}, {}, "ValueError: long ago")
    assert "ValueError: long ago" in status(runs, store)

    # A later attempt dies without a record, and is not heard of any more.
    monkeypatch.setattr(heartbeat, "STALE_AFTER", -1.0)
    monkeypatch.setattr(heartbeat.time, "time", lambda: 4e9)
    beat_of(store, train, state="training", step=1, steps=2)
    assert "ValueError: long ago" not in status(runs, store)
