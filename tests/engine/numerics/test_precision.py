"""A numeric mode holds inside its block, in the backward pass too, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from experiments.engine.data.sets import load
from experiments.engine.numerics.precision import MODES, precision, read_tf32_flags
from experiments.engine.specs.spec import Train
from experiments.engine.training.trainer import Trainer
from tests.support.trainings import CPU, DIGITS, SPEC

# Flags of matrix products and of cuDNN in every mode.
IN_FORCE = {
    "fp32": {"matmul_tf32": False, "cudnn_tf32": False},
    "tf32": {"matmul_tf32": True, "cudnn_tf32": True},
    "bf16": {"matmul_tf32": False, "cudnn_tf32": False},
    "as_published": {"matmul_tf32": False, "cudnn_tf32": True},
}


def set_flags(allowed: bool) -> None:
    """Set both TF32 flags."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def restored_flags() -> Iterator[None]:
    """Restore the flags after a test."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [True, False])
def test_precision_is_set_inside_and_restored(mode: str, before: bool):
    """Even if the block ends by an error."""
    set_flags(before)
    with pytest.raises(RuntimeError, match="inside"), precision(mode, CPU):
        assert read_tf32_flags() == IN_FORCE[mode]
        assert torch.is_autocast_enabled("cpu") == (mode == "bf16")
        raise RuntimeError("inside")
    assert read_tf32_flags() == {"matmul_tf32": before, "cudnn_tf32": before}
    assert not torch.is_autocast_enabled("cpu")


def test_unknown_precision_lists_the_known():
    with pytest.raises(ValueError, match="fp32, tf32, bf16"), precision("fp16", CPU):
        pass


def in_precision(mode: str, steps: int) -> Train:
    """A training of a tiny network in a numeric mode."""
    return replace(SPEC, data=DIGITS, recipe=replace(SPEC.recipe, precision=mode, steps=steps))


@pytest.mark.parametrize("mode", ["fp32", "tf32"])
def test_the_backward_pass_runs_in_the_declared_precision(mode: str):
    set_flags(mode != "tf32")
    trainer = Trainer(in_precision(mode, steps=1))
    flags: list[dict[str, bool]] = []
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda gradient: flags.append(read_tf32_flags()))
    next(trainer.steps(load(DIGITS)))
    assert flags == [IN_FORCE[mode]]


def losses_of(trainer: Trainer) -> list[float]:
    return [loss.item() for loss in trainer.steps(load(DIGITS))]


def test_bf16_trains_fp32_weights():
    trainer = Trainer(in_precision("bf16", steps=4))
    losses = losses_of(trainer)
    weights = (*trainer.model.parameters(), *trainer.ema.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}

    # The losses are close to those of fp32, and not the same.
    exact = losses_of(Trainer(in_precision("fp32", steps=4)))
    assert losses == pytest.approx(exact, rel=0.05)
    assert losses != exact
