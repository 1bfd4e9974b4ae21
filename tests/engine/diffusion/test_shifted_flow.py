"""Logit-normal times, the loss of the direction and shifted steps, as LightningDiT has them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.flow import Flow
from experiments.engine.diffusion.samplers import bind_sampler
from experiments.engine.specs.spec import Diffusion, Sampler
from tests.support.authors import draw_normal
from tests.support.flows import labels, sample
from tests.support.paths import DATA

# Outputs of the authors' code; its grid of 17 points has 16 steps.
CASE = json.loads((DATA / "outputs_objectives.json").read_text())["shifted_flow"]


def field(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A velocity that mixes channels."""
    return torch.sin(2 * x + t.reshape(-1, 1, 1, 1)) + 0.3 * x.roll(1, dims=1)


def test_losses_are_those_of_the_authors_code():
    shape = CASE["shapes"]["x1"]
    data, noise = (draw_normal(CASE["seeds"][name], shape).float() for name in ("x1", "x0"))
    t = draw_normal(CASE["seeds"]["z"], (3,)).sigmoid().float()
    assert t.tolist() == pytest.approx(CASE["outputs"]["t"], abs=1e-6)

    losses = Flow("linear", direction=0.5).losses(field, data, labels(3), t, noise)
    for name in ("mse", "direction"):
        assert losses[name].tolist() == pytest.approx(CASE["outputs"][name], abs=1e-6)
    assert torch.equal(losses["loss"], losses["mse"] + 0.5 * losses["direction"])


def test_shifted_steps_are_those_of_the_authors_code():
    start = draw_normal(CASE["seeds"]["start"], CASE["shapes"]["start"]).float()
    spec = Sampler("euler", num_steps=CASE["points"] - 1, shift=CASE["shift"])
    times = []

    def heard(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(t[0].item())
        return field(x, t, y)

    end = sample(bind_sampler(spec, Flow("linear")), heard, labels(2), start)
    assert times == pytest.approx(CASE["outputs"]["times"][:-1], abs=1e-6)
    assert end.flatten().tolist() == pytest.approx(CASE["outputs"]["euler"], abs=5e-6)


def test_logit_normal_times_are_sigmoids_of_normal_numbers():
    flow = build_diffusion(Diffusion("flow", times="logit_normal"))
    t = flow.draw_times(20_000, torch.Generator().manual_seed(3))
    z = t.logit()
    assert z.mean().item() == pytest.approx(0, abs=0.03)
    assert z.std().item() == pytest.approx(1, abs=0.03)
    assert z.pow(4).mean().item() == pytest.approx(3, abs=0.3)  # 1.8 times less if uniform


def test_the_direction_of_a_single_channel_trains_nothing():
    """It is the sign of a product, whose gradient is zero."""
    x, eps = draw_normal(1, (3, 1, 5, 3)).float(), draw_normal(2, (3, 1, 5, 3)).float()
    gain = torch.ones((), requires_grad=True)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return gain * field(x, t, y)

    t = torch.tensor([0.2, 0.5, 0.9])
    losses = Flow("linear", direction=1.0).losses(model, x, labels(3), t, eps)
    (gradient,) = torch.autograd.grad(losses["direction"].sum(), gain)
    assert abs(gradient.item()) < 1e-5


def test_unknown_times_are_refused():
    with pytest.raises(ValueError, match="unknown times 'normal'; known: uniform, logit_normal"):
        build_diffusion(Diffusion("flow", times="normal"))
