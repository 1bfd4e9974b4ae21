"""The watch over loss and weights, and what a training that goes wrong leaves behind."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from experiments.engine.data.sets import batch_indices, load
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.attempts import read_attempts
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.specs.spec import Recipe, Train
from experiments.engine.training import checkpoint
from experiments.engine.training import stage as training_stage
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from experiments.engine.training.watch.divergence import (
    FEWEST,
    SPIKE,
    BadLoss,
    Diverged,
    find_bad_loss,
)
from tests.support.trainings import DICO, DIGITS

SPEC = Train(DICO, DIGITS, Recipe(steps=40, batch=8, lr=1e-3, warmup=4))


@pytest.fixture
def spoil_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Multiplies every loss from a step on, counted from 1."""
    passes = Trainer._forward_backward

    def spoil(first_bad: int, factor: float) -> None:
        def spoilt(self: Trainer, *inputs: Tensor) -> Tensor:
            loss = passes(self, *inputs)
            return loss * factor if self.step + 1 >= first_bad else loss

        monkeypatch.setattr(Trainer, "_forward_backward", spoilt)

    return spoil


def test_a_loss_that_is_not_finite_is_found_at_its_place():
    assert find_bad_loss([1.0, 2.0, math.nan, math.inf], []) == BadLoss(2, "is nan")
    assert find_bad_loss([1.0, -math.inf], [1.0] * 50) == BadLoss(1, "is -inf")
    assert find_bad_loss([], [1.0] * 50) is None


def test_only_a_lasting_jump_is_a_spike():
    usual = [1.0] * FEWEST
    jump = find_bad_loss([SPIKE + 0.1] * 9, usual)
    assert jump == BadLoss(0, "has jumped to 5.1, from 1 before,")
    later_jump = find_bad_loss([1.0] * 4 + [6.0] * 5, usual)
    assert later_jump is not None and later_jump.index == 4

    # Less than half of the batches are high, or the loss is not high enough.
    assert find_bad_loss([1.0] * 5 + [600.0] * 4, usual) is None
    assert find_bad_loss([SPIKE - 0.1] * 9, usual) is None

    # Too little is known yet, or the loss was as high lately.
    assert find_bad_loss([100.0] * 9, usual[1:]) is None
    assert find_bad_loss([6.0] * 9, [9.0] * 20 + [1.0] * 9 + [9.0] * 11) is None


def test_heavy_tailed_curves_are_no_spikes():
    draw = np.random.default_rng(0)
    level = 0.15 + np.exp(-np.arange(5000) / 300)
    for seed in range(20):
        outliers = np.where(draw.random(5000) < 0.02, 50, 1)
        losses = level * draw.lognormal(0, 0.5, 5000) * outliers
        means: list[float] = []
        for interval in losses.reshape(100, 50):
            assert find_bad_loss(interval.tolist(), means) is None, f"seed {seed}"
            means.append(float(interval.mean()))


@pytest.mark.parametrize(
    ("first_bad", "factor", "problem"),
    [(35, math.nan, "the loss is nan"), (38, 100.0, "the loss has jumped to")],
)
def test_a_training_that_diverges_records_where_and_resumes_from_before(
    first_bad: int,
    factor: float,
    problem: str,
    spoil_losses: Callable[[int, float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(training_stage, "LOG_EVERY", 3)
    spoil_losses(first_bad, factor)
    store, resources = Store(tmp_path), Resources(checkpoint_every=8)
    folder = store.run_dir(SPEC)
    record = execute(SPEC, store, resources)

    # The record names the step, its batch and the checkpoint before it.
    assert record.status == "failed" and record.error is not None
    assert record.error.startswith(f"Diverged: {problem}")
    assert f"at step {first_bad}; lower the learning rate" in record.error
    assert record.values["stopped_at"] == first_bad
    assert record.values["last_checkpoint"] == 32
    batch = batch_indices(len(load(DIGITS)), 8, 0, first_bad - 1).tolist()
    assert record.values["batch"] == batch
    assert record.values["attempts"] == read_attempts(folder)
    assert record.values["attempts"][-1]["reason"] == record.error

    # The checkpoint is good: without the fault the training goes on from it.
    newest = checkpoint.load_newest(folder / "checkpoints")
    assert newest is not None and newest[0] == 32
    monkeypatch.undo()
    again = execute(SPEC, store, resources)
    assert (again.status, again.values["resumed_at"]) == ("done", 32)


def test_a_bad_loss_between_two_log_lines_is_not_saved(
    spoil_losses: Callable[[int, float], None], tmp_path: Path
):
    spoil_losses(11, math.nan)
    with pytest.raises(ValueError, match="^the loss is nan at step 11;"):
        run_training(SPEC, RunContext(tmp_path, Resources(checkpoint_every=8)))
    names = [path.name[:13] for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000008"]


def test_a_failed_save_ends_the_run_at_the_next_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def finish_save(writer: checkpoint.Writer) -> bool:
        writer._thread and writer._thread.join()
        return False

    # The save of step 10 has ended by the next line, whatever the threads do.
    monkeypatch.setattr(training_stage, "LOG_EVERY", 3)
    monkeypatch.setattr(checkpoint, "save", fail)
    monkeypatch.setattr(checkpoint.Writer, "busy", property(finish_save))
    steps: list[int] = []
    context = RunContext(
        tmp_path,
        Resources(checkpoint_every=10),
        report=lambda progress: steps.append(progress.step),
    )
    with pytest.raises(OSError, match="No space left"):
        run_training(SPEC, context)
    assert steps == [3, 6, 9]


@pytest.mark.parametrize("last", [16, 24], ids=["at a checkpoint", "at the last step"])
def test_weights_that_are_not_finite_are_not_saved(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = Train(DICO, DIGITS, Recipe(steps=24, batch=8, lr=1e-3, warmup=4))
    update = Trainer._update

    def spoilt(self: Trainer, *batch: Any) -> Tensor:
        loss = update(self, *batch)
        if self.step + 1 == last:
            next(self.model.parameters()).data.view(-1)[-1] = math.inf
        return loss

    # The newest checkpoint is the one before.
    monkeypatch.setattr(Trainer, "_update", spoilt)
    message = f"^the update made weights that are not finite at step {last}; lower"
    with pytest.raises(Diverged, match=message) as failure:
        run_training(spec, RunContext(tmp_path, Resources(checkpoint_every=8, keep=9)))
    assert failure.value.values["last_checkpoint"] == last - 8
    steps = [checkpoint._step(path) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps) == last - 8
