"""Networks of trainings, as declared and as a finished run averaged them, and their losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import backbones
from experiments.engine.autoregressive.objective import NextScale, check_objective
from experiments.engine.diffusion.build import DiffusionProcess
from experiments.engine.diffusion.distillation import objective
from experiments.engine.diffusion.distillation.objective import Distilled
from experiments.engine.numerics.initial_weights import build_by_name
from experiments.engine.numerics.randomness import seed_at
from experiments.engine.records.code import require_own_code
from experiments.engine.specs.spec import Backbone, Train
from experiments.engine.texts.tables import give_captions
from experiments.engine.training import checkpoint


def build(spec: Backbone, seed: int, device: torch.device, initial: str = "in_order") -> nn.Module:
    """Build the declared network, initialised from the seed, with channels-last activations.

    Args:
        spec: the network.
        seed: of the training.
        device: where the network goes.
        initial: how its weights are drawn, as a Recipe says.

    Raises:
        ValueError: `initial` is unknown, or the network cannot be drawn by name.
    """
    require_own_code(spec)

    def construct() -> nn.Module:
        return backbones.build(spec.name, **spec.options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("init", seed))
        if initial == "in_order":
            model = construct()
        elif initial == "by_name":
            model = build_by_name(construct, seed, partial(backbones.shared_name_of, spec.name))
        else:
            raise ValueError(f"unknown initial weights {initial!r}; known: in_order, by_name")
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_ema(
    spec: Train,
    folder: Path,
    device: torch.device,
    warn: Callable[[str], None] = backbones.print_warning,
) -> nn.Module:
    """Load the EMA network of a finished run, in eval mode.

    Args:
        spec: What was trained.
        folder: Of the run.
        device: Where the network goes.
        warn: Hears what a record must say of the weights.

    Raises:
        ValueError: The run has not finished, or its average is of no trained network.
    """
    newest = checkpoint.load_newest(folder / "checkpoints", device)
    if newest is None or newest[0] < spec.recipe.steps:
        raise ValueError(
            f"run {folder.name} has no finished checkpoint; if it was removed, "
            f"remove records/train/{folder.name}-*.json too and train again"
        )
    _, state = newest
    model = build(spec.backbone, spec.seed, device)
    give_captions(model, spec.data)

    # The network is as its training began, unless that started from another one.
    file = f"runs/{folder.name}/checkpoints"
    inherits = spec.distillation is not None and spec.distillation.inherits
    if spec.init_from is None and not inherits and "model" in state:
        backbones.check_progress(state["ema"], state["model"], model.state_dict(), file)
    backbones.load_judged(model, state["ema"], file, warn=warn)
    return model.eval()


def build_objective(
    spec: Train, teacher: nn.Module | None, tokenizer: nn.Module | None, device: torch.device
) -> DiffusionProcess | Distilled | NextScale:
    """Build what gives a training its losses, of noise or of tokens."""
    check_objective(spec)
    if spec.tokenizer is None:
        return objective.build_objective(spec, teacher, device)
    return NextScale(tokenizer)
