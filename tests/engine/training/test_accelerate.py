"""Compiled networks and CUDA graphs compute the same numbers, in training and sampling."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones.kernels import gated_linear
from experiments.engine.data.sets import ImageSet, load
from experiments.engine.diffusion import iddpm
from experiments.engine.numerics.cuda_graphs import CudaGraph, accelerate
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Diffusion, Recipe, Train
from experiments.engine.timing.networks import fill_zeros
from experiments.engine.training.networks import build
from experiments.engine.training.trainer import Trainer
from tests.support.recording import SYNCHRONISING, Heard, Rerun, needs_gpu
from tests.support.trainings import CPU, DICO, DIGITS, FAMILIES, OBJECTIVES

GPU = torch.device("cuda")
WIDE = FAMILIES["dit"].but(depth=1, dim=384, heads=6)  # its layers run on oneDNN
TRAINED = Train(DICO, DIGITS, Recipe(steps=6, batch=16, lr=1e-2, ema=0.9))
CLIPPED = replace(TRAINED, recipe=replace(TRAINED.recipe, grad_clip=0.1))
DROPPING = Train(FAMILIES["dis"], DIGITS, replace(TRAINED.recipe, drop_path=0.5))
# A bare machine with a GPU may lack the digits.
NOISE = ImageSet(
    np.random.default_rng(0).standard_normal((64, 1, 8, 8), np.float32), np.arange(64) % 10, DIGITS
)


@pytest.mark.parametrize(
    ("spec", "micro_batch"),
    [(TRAINED, None), (TRAINED, 6), (CLIPPED, None), (DROPPING, 6)],
    ids=["whole", "in parts", "clipped", "with stochastic depth"],
)
def test_a_recorded_training_has_the_same_losses_and_weights(spec: Train, micro_batch: int | None):
    usual = Trainer(spec, Resources(micro_batch=micro_batch))
    recorded = Trainer(spec, Resources(micro_batch=micro_batch))
    recorded.forward_backward = Rerun(recorded._forward_backward, recorded.model)
    expected = [loss.item() for loss in usual.steps(load(DIGITS))]
    losses = [loss.item() for loss in recorded.steps(load(DIGITS))]
    assert losses == expected
    assert len(set(expected)) == 6

    # The weights are the same, from one recording.
    assert digest(usual.model) == digest(recorded.model)
    assert digest(usual.ema) == digest(recorded.ema)
    assert len(recorded.forward_backward.captures) == 1


def test_a_recording_lets_other_threads_go_on_and_runs_the_function_aside_before(
    monkeypatch: pytest.MonkeyPatch,
):
    """Use stand-ins for the device.

    Threads that load batches and draw noise pin memory, which a global capture would not allow.
    """
    events: list[str] = []

    @contextmanager
    def capture(graph: Any, capture_error_mode: str = "global") -> Iterator[None]:
        events.append(capture_error_mode)
        yield
        events.append("captured")

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    captured = CudaGraph(lambda x: events.append("ran") or x + 1)

    # Two shapes, and one of them in two modes, are recorded once each.
    for n, mode in ((2, "fp32"), (2, "fp32"), (3, "fp32"), (3, "as_published")):
        with precision(mode, CPU):
            captured(torch.ones(n))
    recording = ["ran", "ran", "ran", "thread_local", "ran", "captured"]
    assert events == recording * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_the_trainer_waits_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch):
    """On a GPU reading one back stops the host, and no graph can hold it."""
    # On a CPU DiG looks at its decays, and the loss at the times, since nothing waits there.
    chunked = sys.modules[gated_linear.choices["chunked"].run.__module__]
    monkeypatch.setattr(chunked, "_decays_mildly", lambda decay: False)
    monkeypatch.setattr(iddpm, "_first_steps", lambda t: None)

    drop_path = 0.1 if name in ("dis", "dimsum") else 0.0
    recipe = Recipe(steps=3, batch=4, grad_clip=1.0, drop_path=drop_path)
    spec = Train(FAMILIES[name], DIGITS, recipe, OBJECTIVES.get(name, Diffusion()))

    # The second step calls many operations, and none that waits for the device.
    stepping = Trainer(spec, Resources(micro_batch=3)).steps(load(DIGITS))
    next(stepping)
    with Heard() as heard:
        next(stepping)
    assert len(heard.names) > 20
    assert not heard.names.keys() & set(SYNCHRONISING)


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        accelerate(build(DICO, 0, CPU), compiled=False, graphs=True)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        Trainer(TRAINED, Resources(graphs=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("network", [DICO, WIDE], ids=lambda b: b.name)
def test_compiled_networks_compute_what_they_computed(network: Backbone):
    model = build(network, 0, CPU).eval()
    compiled = build(network, 0, CPU).eval()
    fill_zeros(model)
    fill_zeros(compiled)
    accelerate(compiled, compiled=True, graphs=False)
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected = model(*inputs)
        out = compiled(*inputs)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert digest(model) == digest(compiled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("network", [DICO, WIDE], ids=lambda b: b.name)
def test_a_compiled_training_has_the_same_losses(network: Backbone):
    spec = Train(network, DIGITS, Recipe(steps=4, batch=16, lr=1e-3))
    eager = torch.stack(list(Trainer(spec).steps(load(DIGITS))))
    compiled = torch.stack(list(Trainer(spec, Resources(compile=True)).steps(load(DIGITS))))
    assert eager.isfinite().all()
    assert (compiled - eager).abs().max() < 1e-4 * eager.abs().max()


@needs_gpu
def test_a_captured_network_computes_what_it_computed_for_every_shape_and_mode():
    model = build(DICO, 0, GPU).eval()
    fill_zeros(model)
    captured = CudaGraph(model)
    for n, is_bf16 in ((3, False), (5, False), (3, True), (3, False)):
        x = torch.randn(n, 1, 8, 8, device="cuda")
        numbers = torch.arange(n, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, is_bf16):
            out = captured(x, numbers, numbers)
            expected = model(x, numbers, numbers)
        rtol, atol = (1e-2, 1e-2) if is_bf16 else (1e-4, 1e-5)
        assert torch.allclose(out, expected, rtol=rtol, atol=atol)

    # One recording for each shape and mode.
    assert len(captured.captures) == 3


@needs_gpu
@pytest.mark.parametrize("micro_batch", [None, 6])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_captured_training_has_the_same_losses(
    micro_batch: int | None, mode: str, compiled: bool
):
    spec = replace(TRAINED, recipe=replace(TRAINED.recipe, grad_clip=1.0, precision=mode))

    def losses(graphs: bool) -> Tensor:
        resources = Resources("cuda", micro_batch, compile=compiled, graphs=graphs)
        return torch.stack(list(Trainer(spec, resources).steps(NOISE)))

    usual = losses(graphs=False)
    captured = losses(graphs=True)
    assert len(captured.unique()) == 6
    assert torch.allclose(captured, usual, rtol=1e-2 if mode == "bf16" else 1e-4)


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_on_a_gpu_does_not_stop_the_host(graphs: bool):
    spec = replace(TRAINED, recipe=replace(TRAINED.recipe, grad_clip=1.0))
    stepping = Trainer(spec, Resources("cuda", graphs=graphs)).steps(NOISE)
    next(stepping)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(stepping)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "network",
    [
        DICO,
        Backbone("dit_s_2", dict(depth=1, dim=384)),
        pytest.param(
            Backbone("hourglass", dict(dim=8, depths=(1, 1, 1, 1, 1))), marks=pytest.mark.slow
        ),
    ],
    ids=lambda b: b.name,
)
def test_a_network_compiles_as_one_graph(network: Backbone):
    """A break, for example at the choice of a kernel, would cost the speed-up."""
    model = build(network.but(input_size=16, in_channels=4, num_classes=10), 0, CPU)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([1, 2]))
    explained = torch._dynamo.explain(model)(*inputs)
    reasons = [str(reason.reason)[:200] for reason in explained.break_reasons]
    assert explained.graph_count == 1, reasons
    assert explained.graph_break_count == 0, reasons
