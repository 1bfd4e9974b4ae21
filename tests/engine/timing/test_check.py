"""Nothing is timed that does not compute what the reference kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.engine.numerics import cuda_graphs
from experiments.engine.specs.spec import Backbone
from experiments.engine.timing import tasks
from experiments.engine.timing.stage import measure_speed
from experiments.engine.training import trainer
from tests.support.timing import DICO, DIT, declare_timing, every_family


@pytest.mark.parametrize(
    "networks",
    [dict(backbone=DIT, baseline=DICO), dict(backbone=DICO, baseline=DIT)],
    ids=["subject", "baseline"],
)
def test_neither_network_is_timed_unchecked(networks: dict[str, Backbone], nearly: str):
    with pytest.raises(ValueError, match="dit_s_2 .*differs from its reference"):
        measure_speed(declare_timing(**networks, kernels={"attention": nearly}))


@pytest.mark.parametrize("mode", ["tf32", "bf16"])
def test_coarse_modes_let_rounding_pass_and_nothing_else(
    mode: str, nearly: str, one_second_clock: None
):
    network = Backbone("dit_s_2", dict(depth=6))
    spec = declare_timing(backbone=network, size=16, channels=4, batch=1, precision=mode)
    with pytest.raises(ValueError, match="differs from its reference"):
        measure_speed(replace(spec, kernels={"attention": nearly}))
    values = measure_speed(replace(spec, kernels={"attention": "sdpa"}))
    assert values["matmul_tf32"] is values["cudnn_tf32"] is (mode == "tf32")


def test_a_wrong_gradient_is_refused_in_training_alone(monkeypatch: pytest.MonkeyPatch):
    def forget_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference(q, k.detach(), v, bias)

    wrong = Choice("forgets", forget_keys)
    monkeypatch.setattr(attention, "choices", {"forgets": wrong} | attention.choices)
    assert measure_speed(declare_timing())["images_per_s"] > 0
    with pytest.raises(ValueError, match="its gradient differs from its reference"):
        measure_speed(declare_timing(what="training"))


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("what", ["forward", "training", "sampling"])
@pytest.mark.parametrize(
    "accelerated", [dict(compile=True), dict(graphs=True)], ids=["compiled", "by graphs"]
)
def test_a_compiled_or_captured_network_is_checked_as_it_is_timed(
    accelerated: dict[str, bool], what: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
):
    """Stand-ins for the compiler and the graphs are a tenth off if they are wrong."""
    batches: set[int] = set()

    def stand_in(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            batches.add(len(args[0]))
            return function(*args) * (1.1 if wrong else 1.0)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    for module in (cuda_graphs, trainer, tasks):
        monkeypatch.setattr(module, "require_gpu", lambda device: None)
    for module in (cuda_graphs, trainer):
        monkeypatch.setattr(module, "CudaGraph", stand_in)

    spec = declare_timing(what=what, num_steps=2, batch=3, **accelerated)
    if wrong:
        with pytest.raises(ValueError, match="compiled|by CUDA graphs"):
            measure_speed(spec)
    else:
        measure_speed(spec)
    # Guidance doubles the batch of a compiled network; a captured step contains it.
    guided_outside = what == "sampling" and "compile" in accelerated
    assert batches == {6 if guided_outside else 3}


def test_the_compiled_passes_of_an_upsampler_are_checked_on_images(
    monkeypatch: pytest.MonkeyPatch, one_second_clock: None
):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    spec = replace(every_family()["upsampler"], what="training", compile=True)
    assert measure_speed(spec)["images_per_s"] == 2
