"""The watch over the loss, the boards, and what a training that goes wrong leaves behind."""

from __future__ import annotations

import errno
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.engine.data.sets import batch_indices, load_data
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime import attempts
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train
from experiments.engine.training import checkpoint
from experiments.engine.training import stage as training_stage
from experiments.engine.training import trainer as train
from experiments.engine.training.log import (
    FEWEST,
    SPIKE,
    WANDB,
    Diverged,
    Log,
    require_boards,
    trouble,
)

SMALL = dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
SPEC = Train(
    Backbone("dico_s", SMALL),
    Data("digits", 8, 1, 10),
    Recipe(steps=40, batch=8, lr=1e-3, warmup=4),
)


def test_a_loss_that_is_no_number_is_found_at_its_place():
    assert trouble([1.0, 2.0, math.nan, math.inf], []) == (2, "is nan")
    assert trouble([1.0, -math.inf], [1.0] * 50) == (1, "is -inf")
    assert trouble([], [1.0] * 50) is None


def test_only_a_lasting_jump_is_a_spike():
    usual = [1.0] * FEWEST
    assert trouble([SPIKE + 0.1] * 9, usual) == (0, "has jumped to 5.1, from 1 before,")
    assert trouble([1.0] * 4 + [6.0] * 5, usual)[0] == 4
    assert trouble([1.0] * 5 + [600.0] * 4, usual) is None  # less than half of the batches
    assert trouble([SPIKE - 0.1] * 9, usual) is None
    assert trouble([100.0] * 9, usual[1:]) is None  # too little is known yet
    assert trouble([6.0] * 9, [9.0] * 20 + [1.0] * 9 + [9.0] * 11) is None


def test_committed_and_heavy_tailed_curves_are_no_spikes():
    draw = np.random.default_rng(0)
    for seed in range(20):
        level = 0.15 + np.exp(-np.arange(5000) / 300)
        losses = level * draw.lognormal(0, 0.5, 5000) * np.where(draw.random(5000) < 0.02, 50, 1)
        intervals = losses.reshape(100, 50)
        means: list[float] = []
        for interval in intervals:
            assert trouble(interval.tolist(), means) is None, seed
            means.append(float(interval.mean()))


@pytest.mark.parametrize("kind", ["nan", "jump"])
def test_a_training_that_goes_wrong_says_where_and_keeps_its_last_good_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training_stage, "LOG_EVERY", 3)
    update, bad = train.Trainer._update, 38 if kind == "jump" else 35

    def worse(self: train.Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = update(self, *batch)
        return loss * (math.nan if kind == "nan" else 100) if self.step + 1 >= bad else loss

    monkeypatch.setattr(train.Trainer, "_update", worse)
    store = Store(tmp_path)
    record = execute(SPEC, store, Resources(checkpoint_every=8))
    expected = (
        {"stopped_at": 35, "last_checkpoint": 32}
        if kind == "nan"
        else {"stopped_at": 38, "last_checkpoint": 32}
    )
    assert record.status == "failed" and expected.items() <= record.values.items()
    words = "the loss is nan" if kind == "nan" else "the loss has jumped to"
    assert (
        record.error.startswith(f"Diverged: {words}")
        and f"at step {bad}; lower the learning rate" in record.error
    )
    assert (
        record.values["batch"] == batch_indices(len(load_data(SPEC.data)), 8, 0, bad - 1).tolist()
    )
    assert (
        record.values["attempts"] == attempts.read_attempts(store.run_dir(SPEC))
        and record.values["attempts"][-1]["reason"] == record.error
    )
    assert checkpoint.load_newest(store.run_dir(SPEC) / "checkpoints")[0] == 32
    monkeypatch.undo()
    again = execute(SPEC, store, Resources(checkpoint_every=8))
    assert (again.status, again.values["resumed_at"]) == ("done", 32)


def test_a_bad_loss_between_two_lines_of_the_log_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update = train.Trainer._update
    monkeypatch.setattr(
        train.Trainer,
        "_update",
        lambda self, *batch: update(self, *batch) * (math.nan if self.step >= 10 else 1),
    )
    with pytest.raises(ValueError, match="^the loss is nan at step 11;"):
        training_stage.run_training(SPEC, RunContext(tmp_path, Resources(checkpoint_every=8)))
    assert [path.name[:13] for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_save_that_failed_ends_the_run_at_the_next_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training_stage, "LOG_EVERY", 3)
    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(
        checkpoint.Writer, "busy", property(lambda self: self._thread and self._thread.join())
    )  # every save is over at once
    steps: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        training_stage.run_training(
            SPEC,
            RunContext(
                tmp_path,
                Resources(checkpoint_every=10),
                report=lambda progress: steps.append(progress.step),
            ),
        )
    assert steps == [3, 6, 9]


@pytest.mark.parametrize("last", [16, 40])
def test_weights_that_are_not_finite_are_not_saved(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update = train.Trainer._update

    def spoilt(self: train.Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = update(self, *batch)
        if self.step + 1 == last:
            next(self.model.parameters()).data.view(-1)[-1] = math.inf
        return loss

    monkeypatch.setattr(train.Trainer, "_update", spoilt)
    with pytest.raises(
        Diverged, match=f"^the update made weights that are not finite at step {last}; lower"
    ) as caught:
        training_stage.run_training(
            SPEC, RunContext(tmp_path, Resources(checkpoint_every=8, keep=9))
        )
    assert (
        caught.value.values["last_checkpoint"] == last - 8
        and max(checkpoint._step(path) for path in (tmp_path / "checkpoints").iterdir()) == last - 8
    )


def test_boards_hear_what_the_lines_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            heard.append({"step": step} | values)

        def finish(self) -> None:
            heard.append("finished")

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init = lambda **options: heard.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv(WANDB, "project")
    folder = tmp_path / "0123456789abcdef"
    with Log(folder, 0) as log:
        log.write(step=3, loss=0.5, lr=1e-3, images_per_s=7.0)
        log.write(step=6, loss=0.25, lr=1e-3, images_per_s=8.0)
    options, *entries, last = heard
    assert {
        "project": "project",
        "id": folder.name,
        "resume": "allow",
    }.items() <= options.items() and last == "finished"
    assert (
        entries == [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        and len(entries) == 2
    )
    with Log(folder, 3) as log:
        assert log.losses == [0.5]


def test_the_lines_of_earlier_attempts_outlive_the_next(tmp_path: Path):
    with Log(tmp_path, 0) as log:
        for step in (3, 6, 9):
            log.write(step=step, loss=1.0, lr=1e-3, images_per_s=7.0)
    again = Log(tmp_path, 6)  # and killed at once: what it has not written out is lost
    assert [
        json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ] == [3, 6]
    again.__exit__()


def test_tensorboard_holds_what_the_lines_say_and_nothing_twice(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in (
        (0, (3, 6, 9)),
        (6, (9, 12)),
    ):  # killed after step 9, and gone on from step 6
        with Log(tmp_path, first) as log:
            for step in steps:
                log.write(step=step, loss=1 / (first + step), lr=1e-3 * step, images_per_s=7.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for name in ("loss", "lr", "images_per_s"):
        assert [(event.step, event.value) for event in board.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines
        ]


def test_a_board_that_is_not_installed_is_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(WANDB, "project")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=f"^.{WANDB} asks for Weights & Biases, which is not installed: pip install wandb, or unset {WANDB}$",
    ):
        training_stage.run_training(SPEC, RunContext(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv(WANDB)
    require_boards()
