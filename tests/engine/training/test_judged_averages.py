"""The weights of the suite's own trainings are judged as published ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.training import checkpoint
from experiments.engine.training.networks import load_ema
from experiments.engine.training.trainer import Trainer
from tests.support.trainings import CPU, SPEC, STEPS

Weights = dict[str, Tensor]


def trained_state() -> dict[str, Any]:
    """Return the state of a training whose weights and average both moved."""
    state = Trainer(SPEC).state()
    for part in ("model", "ema"):
        state[part] = {
            name: value + 0.01 if value.is_floating_point() else value
            for name, value in state[part].items()
        }
    return state


def spoil(change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: {name: change(value) for name, value in weights.items()}


def spoil_first(change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    def apply(weights: Weights) -> Weights:
        first = next(iter(weights))
        return weights | {first: change(weights[first])}

    return apply


def test_a_trained_average_is_loaded_without_a_word(tmp_path: Path):
    state = trained_state()
    checkpoint.save(tmp_path / "checkpoints", STEPS, state)
    warnings: list[str] = []
    model = load_ema(SPEC, tmp_path, CPU, warnings.append)
    assert all(torch.equal(value, state["ema"][k]) for k, value in model.state_dict().items())
    assert warnings == []


@pytest.mark.parametrize(
    "change, words",
    [
        (spoil_first(lambda v: v * torch.nan), "not finite"),
        (spoil_first(lambda v: v + torch.inf), "not finite"),
        (spoil(torch.zeros_like), "matrices are zero"),
        (lambda weights: Trainer(SPEC).state()["ema"], "never updated"),
        (spoil_first(lambda v: v.int()), "stored as int32"),
        (spoil_first(lambda v: v[:1]), "another model"),
    ],
)
def test_averages_that_no_training_left_are_refused(
    change: Callable[[Weights], Weights], words: str, tmp_path: Path
):
    state = trained_state()
    state["ema"] = change(state["ema"])
    checkpoint.save(tmp_path / "checkpoints", STEPS, state)
    with pytest.raises(ValueError, match=words) as failure:
        load_ema(SPEC, tmp_path, CPU)
    assert str(failure.value).startswith(f"runs/{tmp_path.name}/checkpoints")
    assert "\n" not in str(failure.value)
