"""Captured steps of samplers: same images, counts and requests to stop, and nothing that waits."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from backbones.kernels import gated_linear
from experiments.declared import recipes
from experiments.engine.numerics import cuda_graphs as capture
from experiments.engine.numerics.cuda_graphs import CudaGraph
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.preemption import Preempted, StopRequest
from experiments.engine.sampling import counting, samples
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import (
    NetworkSampler,
    can_capture_steps,
    generate_images,
)
from experiments.engine.sampling.networks import Decoder
from experiments.engine.specs.spec import Diffusion, Evaluate, Sampler, Train
from experiments.engine.timing.networks import fill_zeros
from experiments.engine.training.trainer import build
from tests.support.recording import SYNCHRONISING, Heard, Rerun, needs_gpu
from tests.support.trainings import CPU, DIGITS, FAMILIES, OBJECTIVES, SPEC

GPU = torch.device("cuda")
SAMPLERS = {
    "uvit": recipes.UVIT_L.sampler,
    "dim": recipes.DIM.sampler,
    "ldm": recipes.LDM_4.sampler,
    "adm": recipes.ADM_64.sampler,
    "sit": recipes.SIT.sampler,
}
SAMPLERS |= {
    "dimsum": Sampler("euler", channels=None)
}  # its own adapts its steps to the images, and so has to look at them


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_a_sampler_waits_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch):
    """Guided, by the family's own sampler: more steps read no more values back."""
    monkeypatch.setattr(
        sys.modules[gated_linear.choices["chunked"].run.__module__],
        "_decays_mildly",
        lambda decay: False,
    )
    train = Train(FAMILIES[name], DIGITS, SPEC.recipe, OBJECTIVES.get(name, Diffusion()))
    model, sampler = (
        build(train.backbone, 0, CPU).eval(),
        replace(SAMPLERS.get(name, Sampler(channels=None)), scale=1.5, channels=None),
    )
    counts = []
    for num_steps in (3, 4):
        with torch.no_grad(), Heard() as heard:
            steps = NetworkSampler(train, replace(sampler, num_steps=num_steps), CPU)
            steps.sample(model, torch.tensor([1, 2]), [3, 4])
        counts.append(
            sum(heard.names[waits] for waits in (*SYNCHRONISING, "lift_fresh"))
        )  # the last is a tensor made of numbers, which has to be copied to a GPU
    assert counts[0] == counts[1]


STEPPED = [
    (Sampler(), Diffusion()),
    (Sampler("ddim", eta=0.5), Diffusion(variance="fixed")),
    (Sampler("dpm_solver"), Diffusion(variance="fixed", betas="stable_diffusion", first_step=1)),
]
STEPPED += [(Sampler(name), Diffusion("flow")) for name in ("euler", "heun")] + [
    (Sampler("sde", last_step=last), Diffusion("flow")) for last in ("mean", "tweedie")
]


IDDPM = Diffusion()


def evaluation(sampler: Sampler, diffusion: Diffusion = IDDPM) -> Evaluate:
    outputs = (
        dict(learn_sigma=False) if diffusion.name == "flow" or diffusion.variance == "fixed" else {}
    )
    train = Train(FAMILIES["dit"].but(**outputs), DIGITS, SPEC.recipe, diffusion)
    return Evaluate(
        train, replace(sampler, num_steps=5, scale=1.5, channels=None), 8, "digits", "balanced"
    )


def network(spec: Evaluate, device: torch.device = CPU) -> nn.Module:
    model = build(spec.train.backbone, 0, device).eval()
    fill_zeros(model)
    return model


@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_recorded_steps_make_the_same_images_and_count_the_same_evaluations(
    sampler: Sampler, diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch
):
    """By a stand-in for the recording, one a shape for all batches."""
    monkeypatch.setattr(capture, "CudaGraph", Rerun)
    spec = evaluation(sampler, diffusion)
    usual, recorded = CountingModel(network(spec)), CountingModel(network(spec), capture_steps=True)
    for within in (range(3), range(3, 8)):  # as chunks are: batches of 3, then of 3 and 2
        found = [
            torch.cat([x for x, _ in generate_images(spec, counted, CPU, 3, within)])
            for counted in (usual, recorded)
        ]
        assert (
            torch.equal(*found)
            and found[0].isfinite().all()
            and len(found[0].flatten(1).unique(dim=0)) == len(within)
        )
    assert (
        usual.evaluated == recorded.evaluated == 8 * 2 * {"heun": 10}.get(sampler.name, 5)
        and len(recorded.graphs.graph.captures) == 2
    )


@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_beside_its_launch_a_recorded_step_only_copies(
    sampler: Sampler, diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch
):
    """Noise is drawn and copied by another thread on a GPU."""

    class Idle(CudaGraph):
        def _capture(self, places: tuple[Tensor, ...]) -> tuple[Any, ...]:
            return capture.Capture(lambda: None, places, self.function(*places))

    monkeypatch.setattr(capture, "CudaGraph", Idle)
    heard: list[Counter[str]] = []
    for num_steps in (12, 32):
        spec = evaluation(sampler, diffusion)
        counted = CountingModel(network(spec), capture_steps=True)
        with torch.no_grad(), Heard() as names:
            sampler = replace(spec.sampler, num_steps=num_steps)
            steps = NetworkSampler(spec.train, sampler, CPU, launch=counted.launch)
            steps.sample(counted, torch.tensor([1, 2]), [3, 4])
        heard.append(names.names)
    more = {
        name: heard[1][name] - heard[0][name]
        for name in heard[1]
        if heard[1][name] != heard[0][name]
    }
    drawn = {"empty", "unbind", "normal_"}  # the images' noise
    assert more.pop("copy_") <= 4 * 20 and not more.keys() - drawn, more


def test_a_job_that_is_asked_to_stop_stops_between_recorded_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "CudaGraph", Rerun)
    spec, left = (
        evaluation(Sampler()),
        iter([StopRequest.NONE] * 6),
    )  # the first step asks twice, as its network does
    counted = CountingModel(network(spec), capture_steps=True)
    monkeypatch.setattr(counting, "requested_stop", lambda: next(left, StopRequest.STOP))
    with pytest.raises(Preempted):
        list(generate_images(spec, counted, CPU, 8))
    assert 0 < counted.evaluated < 8 * 2 * 5


@pytest.mark.parametrize(
    ("sampler", "whole"),
    [
        (Sampler(scale=2.0), True),
        (Sampler(scale=2.0, interval=(0, 500)), False),
        (Sampler(interval=(0, 500)), True),
        (Sampler("dpm_solver_diffusers"), False),
        (Sampler("dopri5"), False),
    ],
)
def test_steps_are_recorded_where_all_do_the_same(sampler: Sampler, whole: bool):
    spec = replace(
        evaluation(sampler, Diffusion("flow") if sampler.name == "dopri5" else Diffusion()),
        sampler=sampler,
    )
    assert can_capture_steps(spec) is whole and not can_capture_steps(
        replace(spec, classifier=SPEC)
    )


def test_a_set_of_images_is_drawn_by_one_recording_a_shape_which_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[weakref.ref] = []
    shapes: list[tuple[int, ...]] = []

    class Noted(Rerun):
        def _capture(self, places: tuple[Tensor, ...]) -> tuple[Any, ...]:
            made.append(weakref.ref(self))
            shapes.append(places[0].shape)
            return super()._capture(places)

    monkeypatch.setattr(capture, "CudaGraph", Noted)
    monkeypatch.setattr(samples, "CHUNK", 3)
    spec, found = evaluation(Sampler()), []
    for recorded in (False, True):
        drawn = samples.fill_sample_folder(
            spec,
            tmp_path / str(recorded),
            samples.ImageSource(network(spec), Decoder(lambda x: x, {}), {}),
            RunContext(tmp_path, Resources(sample_batch=3, graphs=recorded)),
        )
        found.append((drawn.nfe, drawn.read(0, 8).tolist()))
    gc.collect()
    assert found[0] == found[1] and found[0][0] == 2 * 5
    assert shapes == [(3, 1, 8, 8), (2, 1, 8, 8)] and all(recording() is None for recording in made)


def test_a_gpu_is_given_few_steps_before_it_has_done_them(monkeypatch: pytest.MonkeyPatch):
    events = [MagicMock() for _ in range(5)]
    unused = iter(events)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: next(unused))
    counted = CountingModel(lambda x, t, y: x, capture_steps=True)
    for _ in events:
        counted._limit_steps_under_way(GPU)
    assert [event.synchronize.call_count for event in events] == [1, 1, 1, 0, 0] and all(
        event.record.call_count == 1 for event in events
    )


@needs_gpu
@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_captured_steps_make_the_same_images(sampler: Sampler, diffusion: Diffusion):
    spec = evaluation(sampler, diffusion)
    usual, recorded = (CountingModel(network(spec, GPU), recorded) for recorded in (False, True))
    for within in (range(3), range(3, 8)):
        found = [
            torch.cat([x for x, _ in generate_images(spec, counted, GPU, 3, within)])
            for counted in (usual, recorded)
        ]
        assert (found[1] - found[0]).norm() < 1e-4 * found[0].norm()
    assert usual.evaluated == recorded.evaluated
