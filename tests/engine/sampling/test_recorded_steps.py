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
from experiments.engine.training.networks import build
from tests.support.recording import SYNCHRONISING, Heard, Rerun, needs_gpu
from tests.support.trainings import CPU, DIGITS, FAMILIES, OBJECTIVES, SPEC

GPU = torch.device("cuda")
# DiMSUM's own sampler adapts its steps to the images, and so has to look at them.
SAMPLERS = {
    "uvit": recipes.UVIT_L.sampler,
    "dim": recipes.DIM.sampler,
    "ldm": recipes.LDM_4.sampler,
    "adm": recipes.ADM_64.sampler,
    "sit": recipes.SIT.sampler,
    "dimsum": Sampler("euler", channels=None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_a_sampler_waits_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch):
    """Guided, by the family's own sampler: more steps read no more values back."""
    chunked = sys.modules[gated_linear.choices["chunked"].run.__module__]
    monkeypatch.setattr(chunked, "_decays_mildly", lambda decay: False)
    train = Train(FAMILIES[name], DIGITS, SPEC.recipe, OBJECTIVES.get(name, Diffusion()))
    model = build(train.backbone, 0, CPU).eval()
    guided = replace(SAMPLERS.get(name, Sampler(channels=None)), scale=1.5, channels=None)

    # A tensor that is made of numbers has to be copied to a GPU: it waits too.
    waiting = (*SYNCHRONISING, "lift_fresh")
    counts = []
    for num_steps in (3, 4):
        with torch.no_grad(), Heard() as heard:
            steps = NetworkSampler(train, replace(guided, num_steps=num_steps), CPU)
            steps.sample(model, torch.tensor([1, 2]), [3, 4])
        counts.append(sum(heard.names[operation] for operation in waiting))
    assert counts[0] == counts[1]


STEPPED = [
    (Sampler(), Diffusion()),
    (Sampler("ddim", eta=0.5), Diffusion(variance="fixed")),
    (Sampler("dpm_solver"), Diffusion(variance="fixed", betas="stable_diffusion", first_step=1)),
    (Sampler("euler"), Diffusion("flow")),
    (Sampler("heun"), Diffusion("flow")),
    (Sampler("sde", last_step="mean"), Diffusion("flow")),
    (Sampler("sde", last_step="tweedie"), Diffusion("flow")),
]
IDDPM = Diffusion()


def evaluation(sampler: Sampler, diffusion: Diffusion = IDDPM) -> Evaluate:
    """Return a guided evaluation of five steps, by a network that predicts what it must."""
    outputs = {}
    if diffusion.name == "flow" or diffusion.variance == "fixed":
        outputs = dict(learn_sigma=False)
    train = Train(FAMILIES["dit"].but(**outputs), DIGITS, SPEC.recipe, diffusion)
    guided = replace(sampler, num_steps=5, scale=1.5, channels=None)
    return Evaluate(train, guided, 8, "digits", "balanced")


def network(spec: Evaluate, device: torch.device = CPU) -> nn.Module:
    model = build(spec.train.backbone, 0, device).eval()
    fill_zeros(model)
    return model


def generate(spec: Evaluate, model: CountingModel, device: torch.device, within: range) -> Tensor:
    """Generate some of an evaluation's images, in batches of three."""
    return torch.cat([x for x, _ in generate_images(spec, model, device, 3, within)])


@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_recorded_steps_make_the_same_images_and_count_the_same_evaluations(
    sampler: Sampler, diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch
):
    """By a stand-in for the recording, one a shape for all batches."""
    monkeypatch.setattr(capture, "CudaGraph", Rerun)
    spec = evaluation(sampler, diffusion)
    usual = CountingModel(network(spec))
    recorded = CountingModel(network(spec), capture_steps=True)

    # As chunks are: a batch of 3, then batches of 3 and 2.
    for within in (range(3), range(3, 8)):
        expected = generate(spec, usual, CPU, within)
        assert torch.equal(generate(spec, recorded, CPU, within), expected)
        assert expected.isfinite().all()
        assert len(expected.flatten(1).unique(dim=0)) == len(within)

    # Guidance evaluates twice, and so does a step of Heun's.
    per_image = 2 * (10 if sampler.name == "heun" else 5)
    assert usual.evaluated == recorded.evaluated == 8 * per_image
    assert len(recorded.graphs.graph.captures) == 2


@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_beside_its_launch_a_recorded_step_only_copies(
    sampler: Sampler, diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch
):
    """Noise is drawn and copied by another thread on a GPU."""

    class Idle(CudaGraph):
        def _capture(self, places: tuple[Tensor, ...]) -> tuple[Any, ...]:
            return capture.Capture(lambda: None, places, self.function(*places))

    # Count the operations of 12 and of 32 steps.
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

    # Twenty steps more copy up to four times each, and draw the images' noise.
    fewer, more = heard
    added = {name: more[name] - fewer[name] for name in more if more[name] != fewer[name]}
    assert added.pop("copy_") <= 4 * 20
    assert not added.keys() - {"empty", "unbind", "normal_"}, added


def test_a_job_that_is_asked_to_stop_stops_between_recorded_steps(monkeypatch: pytest.MonkeyPatch):
    """A request that comes during the sampling ends it before the last step."""
    monkeypatch.setattr(capture, "CudaGraph", Rerun)
    spec = evaluation(Sampler())
    counted = CountingModel(network(spec), capture_steps=True)

    # The seventh question is answered. The first step asks twice, as its network does.
    answers = iter([StopRequest.NONE] * 6)
    monkeypatch.setattr(counting, "requested_stop", lambda: next(answers, StopRequest.STOP))
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
    """A sampler whose steps differ, by guidance, history or size, is not recorded."""
    diffusion = Diffusion("flow") if sampler.name == "dopri5" else Diffusion()
    spec = replace(evaluation(sampler, diffusion), sampler=sampler)
    assert can_capture_steps(spec) is whole
    assert not can_capture_steps(replace(spec, classifier=SPEC))


def test_a_set_of_images_is_drawn_by_one_recording_a_shape_which_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All chunks share their recordings, whose memory is free at the end."""
    recordings: list[weakref.ref] = []
    shapes: list[tuple[int, ...]] = []

    class Noted(Rerun):
        def _capture(self, places: tuple[Tensor, ...]) -> tuple[Any, ...]:
            recordings.append(weakref.ref(self))
            shapes.append(places[0].shape)
            return super()._capture(places)

    # Eight images in chunks of three, without and with recordings.
    monkeypatch.setattr(capture, "CudaGraph", Noted)
    monkeypatch.setattr(samples, "CHUNK", 3)
    spec = evaluation(Sampler())
    results = []
    for recorded in (False, True):
        source = samples.ImageSource(network(spec), Decoder(lambda x: x, {}), {})
        context = RunContext(tmp_path, Resources(sample_batch=3, graphs=recorded))
        images = samples.fill_sample_folder(spec, tmp_path / str(recorded), source, context)
        results.append((images.nfe, images.read(0, 8).tolist()))
    usual, by_recording = results
    assert usual == by_recording
    assert usual[0] == 2 * 5

    # One recording for batches of three, and one for the last batch.
    gc.collect()
    assert shapes == [(3, 1, 8, 8), (2, 1, 8, 8)]
    assert all(recording() is None for recording in recordings)


def test_a_gpu_is_given_few_steps_before_it_has_done_them(monkeypatch: pytest.MonkeyPatch):
    """From the third step on, a step waits for the one two steps before."""
    events = [MagicMock() for _ in range(5)]
    unused = iter(events)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: next(unused))
    counted = CountingModel(lambda x, t, y: x, capture_steps=True)
    for _ in events:
        counted._limit_steps_under_way(GPU)
    assert [event.synchronize.call_count for event in events] == [1, 1, 1, 0, 0]
    assert all(event.record.call_count == 1 for event in events)


@needs_gpu
@pytest.mark.parametrize(("sampler", "diffusion"), STEPPED, ids=lambda each: each.name)
def test_captured_steps_make_the_same_images(sampler: Sampler, diffusion: Diffusion):
    """On a GPU, real recordings give the images of the usual steps."""
    spec = evaluation(sampler, diffusion)
    usual = CountingModel(network(spec, GPU), False)
    recorded = CountingModel(network(spec, GPU), True)
    for within in (range(3), range(3, 8)):
        expected = generate(spec, usual, GPU, within)
        error = generate(spec, recorded, GPU, within) - expected
        assert error.norm() < 1e-4 * expected.norm()
    assert usual.evaluated == recorded.evaluated
