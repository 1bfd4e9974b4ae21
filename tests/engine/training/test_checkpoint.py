"""Checkpoint folders after saves in the background, on a full disk, and beside damaged files."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.engine.records import files
from experiments.engine.training import checkpoint
from experiments.engine.training.checkpoint import Writer, load_newest, save


def state(value: float = 0.0) -> dict[str, Any]:
    """What a real state holds: a state_dict with its version, strided weights, plain numbers."""
    model = torch.nn.BatchNorm2d(3)
    model.running_mean.fill_(value)
    weights = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {
        "model": model.state_dict(),
        "ema": {"w": weights},
        "optimizer": {
            "state": {0: {"step": torch.tensor(value)}},
            "param_groups": [{"lr": value, "betas": (0.9, 0.99)}],
        },
    }


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in folder.iterdir())


def test_the_newest_and_the_milestones_are_kept(tmp_path: Path):
    for step in range(10, 100, 10):
        save(tmp_path, step, state(step), keep=3, milestones=40)
    assert steps(tmp_path) == [40, 70, 80, 90]
    (tmp_path / ".step.staged.7.tmp").write_bytes(b"what a killed process left")
    for step in (100, 110):
        save(tmp_path, step, state(step))
    assert steps(tmp_path) == [100, 110]


def test_damaged_files_of_later_steps_do_not_push_out_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for step in (10, 20, 30):
        save(tmp_path, step, state(step), keep=3)
    for path in tmp_path.glob("step-000000[23]0-*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert load_newest(tmp_path)[0] == 10
    assert capsys.readouterr().err.count("is damaged") == 2
    save(tmp_path, 15, state(15))
    assert steps(tmp_path) == [10, 15]
    assert load_newest(tmp_path)[0] == 15


def test_a_damaged_file_of_the_same_step_goes_and_the_one_before_stays(tmp_path: Path):
    save(tmp_path, 20, state(20))
    os.truncate(save(tmp_path, 40, state(40)), 100)
    save(tmp_path, 40, state(41))  # by another number of processes, say: other bits
    assert steps(tmp_path) == [20, 40]
    assert load_newest(tmp_path)[0] == 40


def test_a_background_save_holds_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a training changes after a save has begun does not enter the file."""
    go = threading.Event()
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: go.wait() and write(*arguments))
    live = state(1.0)
    with Writer(tmp_path) as writer:
        # Change the state while the thread waits.
        writer.save(1, live)
        live["ema"]["w"].fill_(2.0)
        live["optimizer"]["state"][0]["step"].fill_(2.0)
        assert not list(tmp_path.iterdir())
        go.set()
        writer.wait()

        # The file holds the state before the change.
        first = load_newest(tmp_path)[1]
        assert first["ema"]["w"].eq(1).all()
        assert first["optimizer"] == {
            "state": {0: {"step": torch.tensor(1.0)}},
            "param_groups": [{"lr": 1.0, "betas": (0.9, 0.99)}],
        }
        assert first["model"]._metadata == state()["model"]._metadata

        # The next save copies into the same memory.
        buffer = writer._copy["ema"]["w"]
        writer.save(2, live)
        assert writer._copy["ema"]["w"] is buffer
        assert writer.stalled > 0

    # At the end the last save is finished.
    step, second = load_newest(tmp_path)
    assert step == 2
    assert second["ema"]["w"].eq(2).all()
    assert second["ema"]["w"].is_contiguous(memory_format=torch.channels_last)


def test_too_little_space_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, state(1))
    before = list(tmp_path.iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 2**20)
    )
    with pytest.raises(
        OSError, match=r"No space left on device: a checkpoint takes 0.00 GB and 0.00 GB are free"
    ) as failure:
        save(tmp_path, 2, state(2))
    assert failure.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_in_the_background_stops_the_run_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An error of the thread is raised by the save after it."""

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # The second save fails.
    with Writer(tmp_path) as writer:
        writer.save(1, state(1))
        writer.wait()
        monkeypatch.setattr(files, "open", Full, raising=False)
        writer.save(2, state(2))
        with pytest.raises(OSError, match="No space left"):
            writer.save(3, state(3))
        monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert load_newest(tmp_path)[0] == 1
