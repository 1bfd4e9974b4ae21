"""What the command line survives: dying workers, a full disk, failed stages, absurd options."""

from __future__ import annotations

import csv
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.jobs import pool as launch
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.pool import run_here
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Backbone, Cost, Data, Recipe, Stage, Train, kind_of

ABLATION = [sys.executable, str(REPOSITORY / "experiments" / "ablation.py")]
TINY = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
BROKEN = Cost(Backbone("dico_s", dict(dim=8, width=3)), 8, 1, 10)
work = launch._work


def cost(dim: int) -> Cost:
    return Cost(TINY.but(dim=dim), 8, 1, 10)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*ABLATION, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


def error_of(*arguments: object) -> str:
    """The single line on standard error of a call that exits with status 2."""
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


Event = tuple[str, str, Any]


def run(root: Path, *jobs: Job, workers: int = 2) -> tuple[bool, list[Event]]:
    """Return whether all went well, and the records and errors as (label, event, text)."""
    events: list[Event] = []

    def notify(job: Job, event: str, payload: Any) -> None:
        if event == "error":
            events.append((job.label, event, payload))
        elif event == "record":
            stage, record = payload
            events.append((job.label, event, f"{kind_of(stage)} {record.status}"))

    return run_here(jobs, root, "cpu", workers, 1, notify), events


def die_by_label(job: Job, *arguments: Any) -> None:
    """Work, or end the process as the job's label says."""
    if job.label == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.label == "leaves":
        os._exit(3)
    work(job, *arguments)


def work_on_a_full_disk(job: Job, *arguments: Any) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.replace = no_space
    work(job, *arguments)


def test_a_worker_that_dies_costs_its_own_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker that is killed or leaves is replaced, and the other jobs run."""
    monkeypatch.setattr(launch, "_work", die_by_label)
    good, events = run(
        tmp_path,
        Job("killed", (cost(8),)),
        Job("lives", (cost(12), cost(16))),
        Job("leaves", (cost(20),)),
        workers=1,
    )

    # Each job has its own end.
    assert not good
    assert events == [
        ("killed", "error", "its process ended with signal SIGKILL"),
        ("lives", "record", "cost done"),
        ("lives", "record", "cost done"),
        ("leaves", "error", "its process ended with exit status 3"),
    ]


def test_a_full_disk_is_one_line_a_job_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "_work", work_on_a_full_disk)
    good, events = run(tmp_path, Job("a", (cost(8),)))
    assert not good
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.tmp"))
    ((label, event, text),) = events
    assert (label, event) == ("a", "error")
    assert text.startswith(f"cannot write {tmp_path}/records/cost/")
    assert text.endswith(".json: No space left on device; free space on its disk")


UNTRAINED = Train(
    BROKEN.backbone, Data("digits", size=8, channels=1, num_classes=10), Recipe(steps=3, batch=4)
)


@pytest.mark.parametrize(
    "chain, broken, goes_on",
    [(True, UNTRAINED, False), (True, BROKEN, True), (False, UNTRAINED, True)],
)
def test_a_training_that_fails_ends_a_chain_and_nothing_else_does(
    chain: bool, broken: Stage, goes_on: bool, tmp_path: Path
):
    good, events = run(tmp_path, Job("a", (cost(8), broken, cost(12)), chain))
    assert not good
    assert events == [
        ("a", "record", "cost done"),
        ("a", "record", f"{kind_of(broken)} failed"),
        *([("a", "record", "cost done")] if goes_on else []),
    ]

    # The failure has one record, which says why.
    records = Store(tmp_path).here
    failed = records.latest(broken, status="failed")
    assert records.by_id()[failed.id] == [failed]
    assert failed.error.startswith("ValueError: dico_s has no option width; known: ")
    assert failed.values == {}


@pytest.mark.slow
def test_a_stage_runs_once_however_many_ask_for_it(tmp_path: Path):
    data = Data("digits", size=8, channels=1, num_classes=10)
    network = TINY.but(input_size=8, in_channels=1, num_classes=10)
    stages: tuple[Stage, ...] = (cost(8), Train(network, data, Recipe(steps=3, batch=4)))

    # Two jobs at once hear of both stages, and there is one record of each.
    good, events = run(tmp_path, Job("a", stages), Job("b", stages), workers=2)
    assert good
    assert len(events) == 4
    kinds = sorted(path.parent.name for path in tmp_path.glob("records/*/*.json"))
    assert kinds == ["cost", "train"]

    # A third job later writes nothing.
    before = files(tmp_path)
    good, _ = run(tmp_path, Job("c", stages))
    assert good
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [("--workers", 0), ("--workers", -1), ("--seeds", -1), ("--seeds", "x"), ("--device", "tpu")],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_absurd_options_are_one_line(arguments: tuple[object, ...], tmp_path: Path):
    assert arguments[0] in error_of("--table", 5, *arguments, "--results", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path):
    error = error_of("--table", 5, "--device", "cuda", "--results", tmp_path / "results")
    assert "--device cpu" in error
    assert not (tmp_path / "results").exists()


# Parameters in millions and Gflops of Table 5's rows.
TABLE_5 = ((33.1, 4.25), (130.0, 16.88), (463.9, 60.24), (701.2, 87.30), (1037.4, 194.15))


@pytest.mark.slow
def test_table_5_from_nothing_and_again(tmp_path: Path):
    options = ("--table", 5, "--results", tmp_path)
    first = call(*options, "--format", "csv")
    assert first.returncode == 0, first.stderr
    assert len(list(tmp_path.glob("records/cost/*.json"))) == 5
    rows = csv.DictReader(io.StringIO(first.stdout))
    for row, (params, gflops) in zip(rows, TABLE_5, strict=True):
        assert round(float(row["params, M: ours"]), 1) == params
        assert round(float(row["Gflops: ours"]), 2) == gflops

    # The same command again, and the report, print the same and write nothing.
    written = {path: path.read_bytes() for path in files(tmp_path)}
    for arguments in ((), ("--report",)):
        again = call(*options, "--format", "csv", *arguments)
        assert again.returncode == 0
        assert again.stdout == first.stdout
        assert again.stderr == ""
    assert {path: path.read_bytes() for path in files(tmp_path)} == written
    assert call(*options, "--dry-run").stdout.count("  done") == 5
