"""Runs that are killed or finished, damaged checkpoints and full disks."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.numerics.weights import digest
from experiments.engine.records import files
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.training import checkpoint
from experiments.engine.training import stage as training_stage
from experiments.engine.training.networks import load_ema
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from tests.support.trainings import CPU, SPEC, STEPS

EVERY_3 = Resources(checkpoint_every=3)


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed."""

    folder: Path
    values: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run, whose folder no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    return Finished(folder, run_training(SPEC, RunContext(folder, EVERY_3)))


@pytest.fixture
def run_folder(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def checkpoints_of(folder: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((folder / "checkpoints").iterdir(), reverse=True)


def read_log(folder: Path) -> list[tuple[int, float, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["lr"]) for entry in entries]


# ---- Killed processes


def train_until_killed(folder: Path, death: str, step: int) -> None:
    """Train in this process, which is killed at a step, or while it writes a checkpoint."""
    torch.set_num_threads(1)
    training_stage.LOG_EVERY = 3
    update, replace_file = Trainer._update, os.replace

    def dying_update(self: Trainer, *inputs: Any) -> Tensor:
        if self.step == step:
            # The newest checkpoint is still being written in the background.
            newest = f"step-{step - step % 3:08d}-*.pt"
            while not list((folder / "checkpoints").glob(newest)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *inputs)

    def dying_replace(source: Path, target: Path) -> None:
        if target.name == "step.staged":
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    if death == "step":
        Trainer._update = dying_update  # type: ignore[method-assign]
    if death == "save":
        files.os.replace = dying_replace  # type: ignore[attr-defined]
    values = run_training(SPEC, RunContext(folder, EVERY_3))
    (folder / "result.json").write_text(json.dumps(values))


def train_through(folder: Path, *deaths: tuple[str, int]) -> dict[str, Any]:
    """Train in one process after another, of which the last one lives; return its values."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["experiments.engine.jobs.execute", "sklearn.datasets", "torch._dynamo"]
    )
    for death, step in (*deaths, ("", 0)):
        process = context.Process(target=train_until_killed, args=(folder, death, step))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if death else 0)
    values: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return values


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path):
    whole = train_through(tmp_path / "whole")
    deaths = ("step", 4), ("step", 7), ("save", 0), ("step", 11)
    killed = train_through(tmp_path / "killed", *deaths)
    assert (whole["resumed_at"], killed["resumed_at"]) == (0, 9)
    assert killed["weights_sha256"] == whole["weights_sha256"]
    assert killed["loss"] == whole["loss"]
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")


# ---- Damaged checkpoints


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "num", "resumed_at"),
    [(flip_bit, 1, 12), (cut, 1, 12), (empty, 1, 12), (flip_bit, 2, 0)],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    damage: Callable[[Path], None],
    num: int,
    resumed_at: int,
    finished: Finished,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    kept = checkpoints_of(run_folder)
    assert [path.name[:13] for path in kept] == ["step-00000014", "step-00000012"]
    for path in kept[:num]:
        damage(path)

    again = run_training(SPEC, RunContext(run_folder, EVERY_3))
    assert again["resumed_at"] == resumed_at
    assert again["weights_sha256"] == finished.values["weights_sha256"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == num
    assert all("is damaged" in line and str(run_folder) not in line for line in lines)

    # The damaged files are gone.
    assert len(checkpoints_of(run_folder)) == 2
    newest = checkpoint.load_newest(run_folder / "checkpoints")
    assert newest is not None and newest[0] == STEPS
    assert not capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_full_disk_is_said_to_be_full_and_leaves_no_checkpoint(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 1, Trainer(SPEC).state())
    assert not list(tmp_path.iterdir())


# ---- Finished and unfinished runs


def test_a_finished_run_is_not_run_again(finished: Finished, run_folder: Path):
    before = {path: path.stat().st_mtime_ns for path in checkpoints_of(run_folder)}
    again = run_training(SPEC, RunContext(run_folder))
    assert again["resumed_at"] == STEPS
    for name in ("weights_sha256", "loss"):
        assert again[name] == finished.values[name]
    assert {path: path.stat().st_mtime_ns for path in checkpoints_of(run_folder)} == before
    weights = digest(load_ema(SPEC, run_folder, CPU))
    assert weights == finished.values["weights_sha256"]


def test_an_unfinished_run_is_not_sampled_from(tmp_path: Path):
    with pytest.raises(ValueError, match="no finished checkpoint"):
        load_ema(SPEC, tmp_path, CPU)
    checkpoint.save(tmp_path / "checkpoints", STEPS - 1, Trainer(SPEC).state())
    with pytest.raises(ValueError, match="no finished checkpoint"):
        load_ema(SPEC, tmp_path, CPU)


def test_the_cadence_of_checkpoints_and_a_cut_log_change_nothing(
    finished: Finished, tmp_path: Path
):
    heard: list[tuple[int, int]] = []
    context = RunContext(
        tmp_path,
        Resources(checkpoint_every=5, micro_batch=16),
        report=lambda progress: heard.append((progress.step, progress.total)),
    )
    values = run_training(SPEC, context)
    assert values["weights_sha256"] == finished.values["weights_sha256"]
    assert heard == [(STEPS, STEPS)]

    # A process that was killed may have cut the last line.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    assert run_training(SPEC, RunContext(tmp_path))["loss"] == values["loss"]
    assert [step for step, _, _ in read_log(tmp_path)] == [STEPS]
