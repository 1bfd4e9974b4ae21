"""The log of a training and the boards that are fed from it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.runtime.context import RunContext
from experiments.engine.training.boards import TOKEN, WANDB, board_id, require_boards
from experiments.engine.training.log import Log
from experiments.engine.training.stage import run_training
from tests.support.trainings import SPEC


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_weights_and_biases_hears_what_the_lines_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heard: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            heard.append({"step": step} | values)

        def finish(self) -> None:
            heard.append("finished")

    def init(**options: Any) -> Run:
        heard.append(options)
        return Run()

    # A stand-in for the library.
    module: Any = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv(WANDB, "project")
    folder = tmp_path / "0123456789abcdef"
    with Log(folder, 0) as log:
        log.write(step=3, loss=0.5, lr=1e-3, images_per_s=7.0)
        log.write(step=6, loss=0.25, lr=1e-3, images_per_s=8.0)

    # It hears every line of the file, and a name that outlives a restart.
    options, *entries, last = heard
    expected = {"project": "project", "id": board_id(folder), "resume": "allow"}
    assert expected.items() <= options.items()
    assert last == "finished"
    assert len(entries) == 2
    assert entries == read_lines(folder)
    with Log(folder, 3) as log:
        assert log.losses == [0.5]


def test_the_lines_of_earlier_attempts_outlive_the_next(tmp_path: Path):
    with Log(tmp_path, 0) as log:
        for step in (3, 6, 9):
            log.write(step=step, loss=1.0, lr=1e-3, images_per_s=7.0)
    # The next attempt is killed at once: what it has not written is lost.
    again = Log(tmp_path, 6)
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 6]
    again.__exit__()


def test_tensorboard_holds_what_the_lines_say_and_nothing_twice(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The first attempt is killed after step 9, and the second goes on from step 6.
    for first, steps in ((0, (3, 6, 9)), (6, (9, 12))):
        with Log(tmp_path, first) as log:
            for step in steps:
                log.write(step=step, loss=1 / (first + step), lr=1e-3 * step, images_per_s=7.0)

    lines = read_lines(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for name in ("loss", "lr", "images_per_s"):
        events = [(event.step, event.value) for event in board.Scalars(name)]
        assert events == [(line["step"], pytest.approx(line[name])) for line in lines]


def test_a_board_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(WANDB, "project")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        f"^.{WANDB} asks for Weights & Biases, which is not installed: "
        f"pip install wandb, or unset {WANDB}$"
    )
    with pytest.raises(ValueError, match=message):
        run_training(SPEC, RunContext(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv(WANDB)
    require_boards()


def test_an_id_on_a_board_belongs_to_one_run_folder(tmp_path: Path):
    spec = "0123456789abcdef"
    first, second = tmp_path / "a" / spec, tmp_path / "b" / spec
    name = board_id(first)
    assert name.startswith(f"{spec}-") and (first / TOKEN).read_text().strip() == name[17:]

    # A run resumes, also after its results folder was moved.
    assert board_id(first) == name
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / spec
    assert board_id(moved) == name

    # The same spec in another results folder is another run, and so is another spec beside it.
    others = {board_id(second), board_id(second.with_name("f" * 16))}
    assert len(others | {name}) == 3

    # A damaged token is replaced, and a run that was removed starts anew.
    (second / TOKEN).write_bytes(b"\xff")
    fresh = board_id(second)
    assert fresh not in others and board_id(second) == fresh
    (second / TOKEN).unlink()
    assert board_id(second) != fresh
