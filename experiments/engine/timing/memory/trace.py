"""Trace the memory of a training's step without running it, and describe it by a few lines."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.engine.numerics.recompute import find_blocks
from experiments.engine.reporting.efficiency.memory import (
    Gradients,
    Line,
    Needs,
    highest_lines,
    network_id,
)
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Train
from experiments.engine.timing.memory.gpu import as_on_gpu, cast_again
from experiments.engine.timing.memory.live import Storages, frees_at_once
from experiments.engine.training.networks import build
from experiments.engine.training.trainer import Trainer

META, CPU = torch.device("meta"), torch.device("cpu")
# Images of a traced step: a prime. What it divides is made of one part for each image, and what it
# does not divide is the same for any number of images.
TRACED = 241


@dataclass(frozen=True)
class Trace:
    """The storages of a forward and a backward pass, beside parameters, optimiser and average."""

    # Bytes of each storage.
    nbytes: tuple[int, ...]
    # Storages from 1 on as they are made, and as their negatives when they are freed.
    events: tuple[int, ...]
    # Those of gradients of parameters.
    gradients: frozenset[int]

    @property
    def peak(self) -> int:
        """Return the most bytes that are alive at once, gradients among them."""
        return int(self._alive(self.nbytes).max(initial=0))

    def lines(self, images: int, without: Collection[int] = ()) -> tuple[Line, ...]:
        """Describe what is alive by the lines that are the highest at some number of images.

        Args:
            images: of the traced step, which divide no storage that is the same for any number.
            without: storages that are left out.
        """
        fixed, per_image = [], []
        for number, size in enumerate(self.nbytes, start=1):
            size = 0 if number in without else size
            grows = size % images == 0
            fixed.append(0 if grows else size)
            per_image.append(size // images if grows else 0)
        moments = zip(self._alive(fixed).tolist(), self._alive(per_image).tolist(), strict=True)
        return highest_lines(Line(*moment) for moment in moments)

    def _alive(self, sizes: Sequence[int]) -> np.ndarray:
        """Return the sum over the living storages after each event."""
        events = np.array(self.events, dtype=np.int64)
        return (np.sign(events) * np.array([0, *sizes])[np.abs(events)]).cumsum()


def trace_needs(train: Train, recompute: bool) -> Needs:
    """Trace the memory of a training by one process as a GPU would take it.

    Raises:
        ValueError: the training holds more than its network, its network has no blocks to compute
            again, or a layer has a width that a trace takes for images.
    """
    model = build_meta(train)
    require_other_widths([model])
    trace = trace_fake(train, TRACED, recompute)
    blocks = [_trained_bytes(block) for block in find_blocks(model)]
    trained = _trained_bytes(model)
    return Needs(
        network_id(train.backbone),
        train.backbone.name,
        train.data.size,
        train.recipe.precision,
        recompute,
        weights=sum(x.nbytes for x in itertools.chain(model.parameters(), model.buffers())),
        trained=trained,
        block=max(blocks, default=0),
        outside=trained - sum(blocks),
        lines={
            Gradients.COMING: trace.lines(TRACED),
            Gradients.APART: trace.lines(TRACED, without=trace.gradients),
        },
    )


def require_other_widths(models: Iterable[nn.Module]) -> None:
    """Raise ValueError if a layer has a width that a trace takes for images."""
    if any(size % TRACED == 0 for model in models for p in model.parameters() for size in p.shape):
        raise ValueError(f"a layer's width is a multiple of {TRACED}, the images of a traced step")


def _trained_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def trace_fake(train: Train, num: int, recompute: bool, as_gpu: bool = True) -> Trace:
    """Trace a step on so many images with tensors that have no values.

    Args:
        train: the training, by its own objective.
        num: images of the step.
        recompute: whether blocks are computed again in the backward pass.
        as_gpu: whether operators and casts are a GPU's, or this CPU's.

    Raises:
        ValueError: the training holds more than its network.
    """
    if train.alignment or train.distillation or train.data.captions:
        raise ValueError(
            "only trainings that hold one network and no captions are traced, and this one has an "
            "encoder, a teacher or captions beside it"
        )
    train = replace(train, recipe=replace(train.recipe, batch=num), init_from=None)
    model = build_meta(train)
    if as_gpu and recompute:
        cast_again(find_blocks(model))
    trainer = Trainer(train, Resources("meta", recompute=recompute), model=model)
    trainer.device = CPU
    with FakeTensorMode(), as_on_gpu() if as_gpu else nullcontext():
        replace_by_fakes([trainer.entry, trainer.objective], CPU)
        return trace_step(trainer)


def build_meta(train: Train) -> nn.Module:
    """Build the network of a training without memory."""
    with META:
        return build(train.backbone, train.seed, META)


def replace_by_fakes(owners: Iterable[object], device: torch.device) -> None:
    """Put fake tensors in the place of those of modules and of what else has tensors."""
    fakes: dict[int, Any] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in fakes:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            is_parameter = isinstance(x, nn.Parameter)
            # The original stays, or its id would be used again.
            fakes[id(x)] = x, nn.Parameter(made, x.requires_grad) if is_parameter else made
        return fakes[id(x)][1]

    # A module has its tensors in two dictionaries; a schedule has them as attributes.
    for owner in owners:
        owned = [vars(owner)]
        if isinstance(owner, nn.Module):
            owned = [x for module in owner.modules() for x in (module._parameters, module._buffers)]
        for tensors in owned:
            tensors.update({k: fake(x) for k, x in tensors.items() if isinstance(x, Tensor)})


def trace_step(trainer: Trainer) -> Trace:
    """Trace the forward and the backward pass of a trainer's batch, real or fake."""
    recipe, data = trainer.spec.recipe, trainer.spec.data
    parameters = [p for p in trainer.entry.parameters() if p.requires_grad]
    known = [*trainer.entry.parameters(), *trainer.entry.buffers()]
    known += [x for x in vars(trainer.objective).values() if isinstance(x, Tensor)]
    for parameter in parameters:
        parameter.grad = None

    # Images and noise are drawn inside, because they belong to what a step needs.
    storages = Storages(known)
    with frees_at_once(), storages:
        shape = (recipe.batch, data.channels, data.size, data.size)
        x0 = torch.zeros(shape, device=trainer.device)
        y = torch.zeros(recipe.batch, dtype=torch.long, device=trainer.device)
        trainer.forward_backward(*trainer.draw(0, x0, y, data.flip, trainer.shard))
        gradients = [storages.number_of(p.grad) for p in parameters if p.grad is not None]
    return Trace(tuple(storages.nbytes), tuple(storages.events), frozenset(gradients))
