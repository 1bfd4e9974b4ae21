"""Trace the memory of forward passes without running them, and describe it by a few lines."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.engine.numerics.precision import precision
from experiments.engine.reporting.efficiency.memory import Line
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing.memory.gpu import as_on_gpu
from experiments.engine.timing.memory.live import Storages, frees_at_once
from experiments.engine.timing.memory.trace import (
    CPU,
    META,
    TRACED,
    Trace,
    replace_by_fakes,
    require_other_widths,
)
from experiments.engine.timing.networks import layout_of, list_networks, size_backbone
from experiments.engine.training.networks import build

# The second pass finds the weights that autocast has cast in the first, as every later one does.
PASSES = 2


def trace_inference(timing: Timing) -> tuple[int, tuple[Line, ...]]:
    """Trace forward passes as a GPU would take them.

    Returns:
        The bytes of parameters and buffers, and the lines of what is alive beside them.

    Raises:
        ValueError: a layer has a width that a trace takes for images.
    """
    models = _build_models(timing)
    require_other_widths(models)
    weights = sum(x.nbytes for x in _tensors(models))
    return weights, trace_passes(timing, TRACED).lines(TRACED)


def trace_passes(timing: Timing, num: int, as_gpu: bool = True) -> Trace:
    """Trace passes of so many images through all networks, with tensors that have no values.

    Args:
        timing: a forward pass.
        num: images of the passes.
        as_gpu: whether operators and casts are a GPU's, or this CPU's.
    """
    networks, models = list_networks(timing), _build_models(timing)
    rules = as_on_gpu() if as_gpu else nullcontext()
    with FakeTensorMode(), rules, precision(timing.precision, CPU):
        replace_by_fakes(models, CPU)
        storages = Storages(_tensors(models))

        # Inputs are made inside, because they belong to what a pass needs.
        with frees_at_once(), torch.no_grad(), storages:
            inputs = [_make_inputs(network, timing, num) for network in networks]
            for _ in range(PASSES):
                for model, (x, t, y) in zip(models, inputs, strict=True):
                    model(x, t, y)
    return Trace(tuple(storages.nbytes), tuple(storages.events), frozenset())


def _build_models(timing: Timing) -> list[nn.Module]:
    """Build the networks of a timing without memory, in its layout."""
    models = []
    with META:
        for network in list_networks(timing):
            model = build(size_backbone(network), 0, META)
            models.append(model.to(memory_format=layout_of(timing)).eval())
    return models


def _tensors(models: list[nn.Module]) -> list[Tensor]:
    return [x for model in models for x in (*model.parameters(), *model.buffers())]


def _make_inputs(network: Cost, timing: Timing, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make x (N,C,H,W), t (N,) and y (N,)."""
    shape = (num, network.channels, network.size, network.size)
    x = torch.empty(shape, memory_format=layout_of(timing))
    t, y = (torch.zeros(num, dtype=torch.long) for _ in range(2))
    return x, t, y
