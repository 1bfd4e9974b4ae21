"""Worker processes that are interrupted and ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from experiments.ablation import TABLES
from experiments.engine.jobs import execute
from experiments.engine.jobs import pool as launch
from experiments.engine.jobs.job import Job
from experiments.engine.records.code import own_code
from experiments.engine.records.files import written_whole
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.stages import cost_stage
from tests.support.commands import hear_interrupts


def loading_torch(pid: int) -> bool:
    """Whether a child of this process has begun to load torch."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if "libtorch" in Path(f"/proc/{child}/maps").read_text():
                return True
    return False


@pytest.mark.slow
def test_an_interrupt_while_workers_load_is_one_line(tmp_path: Path):
    options = ["--table", "5", "--results", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "experiments/ablation.py", *options],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )

    # The signal comes while the first worker loads torch.
    while not loading_torch(running.pid):
        assert running.poll() is None
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate()
    assert errors.splitlines() == ["interrupted; run the same command again to continue"]
    assert running.returncode == 130


def write_for_ever(folder: Path, pipe: Connection) -> None:
    """A worker whose stage writes a file and never comes to its end."""

    def endless(*_: object) -> None:
        with written_whole(folder / "file"):
            pipe.send("writing")
            signal.pause()

    execute.execute = endless
    job = Job("endless", (cost_stage(TABLES[5].rows[0]),))
    launch._work(job, folder, "cpu", 1, pipe, {}, own_code())


@pytest.mark.slow
def test_a_worker_that_is_ended_removes_what_it_was_writing(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=write_for_ever, args=(tmp_path, theirs))
    process.start()

    # A worker that dies closes the pipe, so that this test fails and does not wait.
    theirs.close()
    assert ours.recv() == "writing"
    assert list(tmp_path.iterdir())

    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
