"""Power-function averages of a training: kept beside the EMA, stored now and then, rebuilt later.

Two widths are kept. A time is a number of steps. The first step keeps nothing of what was there, so
such an average holds no initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.numerics.parts import own_parts
from experiments.engine.numerics.power_average import (
    Rebuilt,
    Stored,
    decay_at,
    exponent_of,
    rebuild,
)
from experiments.engine.specs.spec import Recipe, Train
from experiments.engine.training import checkpoint

FOLDER = "averages"  # of a run, where the averages are stored
WIDTHS = (0.05, 0.10)  # EDM2's
MAX_INITIAL = 0.01  # share of first weights in an average from which records warn


def snapshot_steps(recipe: Recipe) -> list[int]:
    """Return the steps after which the averages are stored; the last is that of the training.

    Raises:
        ValueError: there are fewer steps than snapshots.
    """
    num = recipe.power_snapshots
    if not 0 <= num <= recipe.steps:
        raise ValueError(
            f"a training of {recipe.steps} steps can store its averages 0 to {recipe.steps} times, "
            f"not {num} times"
        )
    return [recipe.steps * k // num for k in range(1, num + 1)]


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return what the record of a training says of its stored averages."""
    return {"widths": list(WIDTHS), "steps": snapshot_steps(recipe), "dtype": "float32"}


def describe_average(recipe: Recipe, width: float) -> dict[str, Any]:
    """Return what the record of a score says of the average of a width."""
    return {
        "width": width,
        "exponent": exponent_of(width),
        "profile_error": _rebuild(recipe, width).error,
        "snapshots": recipe.power_snapshots,
        "kept_widths": list(WIDTHS),
    }


def initial_share(recipe: Recipe, width: float | None = None) -> float:
    """Return the share of the first weights in an average at the end of a training.

    Args:
        recipe: of the training.
        width: of a power-function average, which holds none of them; None: of the decay's average.
    """
    return 0.0 if width is not None else recipe.ema**recipe.steps


def warn_of_initial_share(share: float) -> list[str]:
    """Warn of an average that still holds more than a hundredth of the first weights."""
    if share <= MAX_INITIAL:
        return []
    return [
        f"{share:.1%} of the average are still the weights that the training began with; train "
        "longer, or average by a lower decay"
    ]


class PowerAverages:
    """The averages of a network's parameters, in float32, one for each width."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._averages = {
            width: {name: p.detach().clone() for name, p in self._parameters.items()}
            for width in WIDTHS
        }

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        weights: list[Tensor] = list(self._parameters.values())
        for width, average in self._averages.items():
            update_average(list(average.values()), weights, decay_at(width, step))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by width."""
        return {f"{width:g}": average for width, average in self._averages.items()}

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Return what is stored: the averages, and the buffers as they are now."""
        return self.state() | {"buffers": dict(self._model.named_buffers())}

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from the averages of a checkpoint."""
        for width, average in self._averages.items():
            for name, tensor in average.items():
                tensor.copy_(state[f"{width:g}"][name])


@torch.no_grad()
def update_average(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """Move every average to decay * average + (1 - decay) * weight."""
    torch._foreach_lerp_(own_parts(averages), own_parts(weights), 1 - decay)


def load_power_average(
    model: nn.Module,
    spec: Train,
    folder: Path,
    width: float,
    warn: Callable[[str], None] = backbones.print_warning,
) -> Rebuilt:
    """Give a network the average of a width that a finished run stored the parts of.

    Args:
        model: the network, as `build` makes it.
        spec: what was trained.
        folder: of the run.
        width: of the average.
        warn: hears what a record must say of the weights.

    Raises:
        ValueError: the training stored no averages or has not finished, an average is missing or
            damaged, or no average has the width.
    """
    paths = _stored_paths(spec, folder)
    rebuilt = _rebuild(spec.recipe, width)

    # Sums are float64, since coefficients of both signs nearly cancel.
    total: dict[str, Tensor] = {}
    for one, coefficient in zip(rebuilt.stored, rebuilt.coefficients.tolist(), strict=True):
        _, state = checkpoint.load(paths[int(one.time)])
        for name, tensor in state[f"{one.width:g}"].items():
            part = tensor.double() * coefficient
            total[name] = total[name] + part if name in total else part

    # Buffers are those of the last step.
    _, last = checkpoint.load(paths[spec.recipe.steps])
    weights = {name: tensor.float() for name, tensor in total.items()} | last["buffers"]
    backbones.load_judged(model, weights, f"runs/{folder.name}/{FOLDER}", warn=warn)
    return rebuilt


def load_snapshot(
    model: nn.Module, spec: Train, folder: Path, step: int, warn: Callable[[str], None]
) -> None:
    """Give a network the narrowest average that a finished run stored after a step.

    Args:
        model: the network, as `build` makes it.
        spec: what was trained.
        folder: of the run.
        step: one of `snapshot_steps`.
        warn: hears what a record must say of the weights.

    Raises:
        ValueError: the training stored no averages, or the average is missing or damaged.
    """
    _, state = checkpoint.load(_stored_paths(spec, folder)[step])
    weights = state[f"{min(WIDTHS):g}"] | state["buffers"]
    backbones.load_judged(model, weights, f"runs/{folder.name}/{FOLDER}", warn=warn)


def _rebuild(recipe: Recipe, width: float) -> Rebuilt:
    """Return how the average of a width at the end of a training is rebuilt."""
    stored = [Stored(step, kept) for step in snapshot_steps(recipe) for kept in WIDTHS]
    return rebuild(stored, recipe.steps, width)


def _stored_paths(spec: Train, folder: Path) -> dict[int, Path]:
    """Return the files of a run's averages by step; ValueError unless all are there and intact."""
    steps = snapshot_steps(spec.recipe)
    if not steps:
        raise ValueError(
            f"run {folder.name} kept no power-function averages, so no other length can be "
            "rebuilt; declare power_snapshots in its Recipe and train again"
        )

    # One damaged file makes all lengths wrong.
    intact = dict(checkpoint.intact(folder / FOLDER))
    missing = [step for step in steps if step not in intact]
    if missing:
        raise ValueError(
            f"run {folder.name} lacks intact averages of step {missing[0]} in {FOLDER}/; if the "
            f"run has finished, remove records/train/{folder.name}-*.json and its checkpoints "
            "and train again"
        )
    return {step: intact[step] for step in steps}
