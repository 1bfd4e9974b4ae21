"""Schedules, losses and DPM-Solver++ of the families that do not train as DiT does."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.dpm_solvers import DiffusersDPMSolver, DPMSolver
from experiments.engine.diffusion.flow import Flow
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import BETAS, IDDPM, Model
from experiments.engine.diffusion.samplers import (
    DDIM,
    Ancestral,
    BoundSampler,
    bind_sampler,
)
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.specs.spec import Diffusion, Sampler
from tests.support.flows import ImpulseNoise, labels, sample

MEAN = 0.3
STD = 0.7
UVIT = Diffusion(betas="stable_diffusion", variance="fixed", first_step=1)


def gaussian(diffusion: IDDPM) -> Model:
    """The expected noise of data N(MEAN, STD^2), in between of the diffusion's steps too."""
    log_a = 0.5 * np.log(np.cumprod(1 - diffusion.betas.numpy()))

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        index = t.double().numpy() - diffusion.timesteps[0].item()
        log_at_t = np.interp(index, np.arange(len(log_a)), log_a)
        a = torch.from_numpy(np.exp(log_at_t)).reshape(-1, 1, 1, 1)
        return (1 - a**2).sqrt() * (x - a * MEAN) / (a**2 * STD**2 + 1 - a**2)

    return model


def test_betas_are_the_closed_forms():
    i = np.arange(1000)
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = {
        "linear": 1e-4 + i * (2e-2 - 1e-4) / 999,
        "stable_diffusion": (0.00085**0.5 + i * (0.012**0.5 - 0.00085**0.5) / 999) ** 2,
        "ldm_imagenet": (0.0015**0.5 + i * (0.0195**0.5 - 0.0015**0.5) / 999) ** 2,
        "cosine": np.minimum(1 - bar[1:] / bar[:-1], 0.999),
    }
    assert expected.keys() == BETAS.keys()
    for name, betas in expected.items():
        np.testing.assert_allclose(BETAS[name](1000).numpy(), betas, rtol=1e-10, atol=1e-15)
    assert 1 - np.cumprod(1 - expected["cosine"])[-1] == pytest.approx(1, abs=1e-6)


def test_the_default_declaration_is_dits_process():
    expected = IDDPM.linear()
    diffusion = build_diffusion(Diffusion())
    assert diffusion.learned
    assert torch.equal(diffusion.betas, expected.betas)
    assert torch.equal(diffusion.timesteps, expected.timesteps)


def test_a_declaration_becomes_its_process():
    uvit = build_diffusion(UVIT)
    assert uvit.timesteps[0] == 1
    assert uvit.timesteps[-1] == 1000
    assert uvit.learned is False
    assert uvit.respaced(10).learned is False
    assert isinstance(build_diffusion(Diffusion("flow", path="gvp")), Flow)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(name="edm"), "iddpm, classify, flow"),
        (dict(betas="sigmoid"), "linear, cosine"),
        (dict(variance="none"), "learned, fixed"),
        (dict(name="flow", path="vp"), "linear, gvp"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(change: dict[str, str], words: str):
    with pytest.raises(ValueError, match=f"known: {words}"):
        build_diffusion(replace(Diffusion(), **change))


def test_the_loss_of_a_network_that_predicts_the_noise_alone():
    diffusion = build_diffusion(UVIT)
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 2, 3, 5, generator=draw)
    eps = torch.randn(6, 2, 3, 5, generator=draw)
    t = torch.tensor([0, 1, 500, 998, 999, 3])
    times: list[Tensor] = []

    def model(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        times.append(time)
        return torch.sin(x)

    # The network hears steps from 1 on.
    losses = diffusion.losses(model, x0, labels(6), t, eps)
    assert losses.keys() == {"loss", "mse"}
    assert torch.equal(times[0], t + 1)

    # The loss is that of the noise, written out in numpy.
    a = np.sqrt(np.cumprod(1 - BETAS["stable_diffusion"](1000).numpy()))[t]
    a = a[:, None, None, None]
    x_t = a * x0.double().numpy() + np.sqrt(1 - a**2) * eps.double().numpy()
    expected = ((eps.numpy() - np.sin(x_t)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(losses["loss"].numpy(), expected, rtol=1e-5)


def test_a_network_that_predicts_a_variance_too_is_refused():
    x = torch.zeros(6, 2, 3, 5)
    t = torch.zeros(6, dtype=torch.long)
    complaint = "fixed variance needs 2 output channels for 2 of data, the prediction has 4"
    with pytest.raises(ValueError, match=complaint):
        build_diffusion(UVIT).losses(
            lambda x, time, y: torch.cat([x, x], 1), x, labels(6), t, torch.zeros_like(x)
        )


@pytest.mark.parametrize("betas", ["stable_diffusion", "ldm_imagenet", "cosine"])
def test_ancestral_sampling_with_the_posteriors_variance(betas: str):
    """Against the recursion of mean and variance in numpy, and near the data."""
    diffusion = build_diffusion(Diffusion(betas=betas, variance="fixed")).respaced(200)
    cumprod = diffusion.alphas_cumprod.numpy()
    mean = 0.0
    variance = 1.0
    for i in reversed(range(200)):
        here = cumprod[i]
        before = cumprod[i - 1] if i else 1.0
        beta = 1 - here / before
        gain = here**0.5 * STD**2 / (here * STD**2 + 1 - here)  # slope of E[x0 | x]
        c1 = beta * before**0.5 / (1 - here)
        c2 = (1 - before) * (1 - beta) ** 0.5 / (1 - here)
        slope = c1 * gain + c2
        mean = slope * mean + c1 * MEAN * (1 - gain * here**0.5)
        noise = beta * (1 - before) / (1 - here) if i else 0  # the last step adds none
        variance = slope**2 * variance + noise

    # One impulse at each draw: the last image has the mean, the others show the variance.
    original = build_diffusion(Diffusion(betas=betas, variance="fixed"))
    first = torch.zeros(202, 1, 1, 1)
    first[0] = 1
    x = sample(Ancestral(diffusion), gaussian(original), labels(202), ImpulseNoise(first))
    assert x[-1].item() == pytest.approx(mean, rel=1e-4)
    assert (x[:-1] - x[-1]).square().sum().item() == pytest.approx(variance, rel=1e-4)
    assert mean == pytest.approx(MEAN, rel=0.02)
    assert variance == pytest.approx(STD**2, rel=0.1)


def flowed(diffusion: IDDPM, first: Tensor, end: int = 0) -> Tensor:
    """Where the probability flow leads: standardised deviations from the mean stay constant."""
    a = diffusion.alphas_cumprod.sqrt()
    deviation = (a**2 * STD**2 + 1 - a**2).sqrt()
    return a[end] * MEAN + deviation[end] * (first.double() - a[-1] * MEAN) / deviation[-1]


def test_dpm_solver_converges_to_the_flow_at_order_two():
    diffusion = build_diffusion(UVIT)
    first = torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1)

    def error(sampler: BoundSampler) -> float:
        x = sample(sampler, gaussian(diffusion), labels(5), ImpulseNoise(first))
        return (x - flowed(diffusion, first)).abs().max().item()

    errors = [error(DPMSolver(diffusion, n)) for n in (64, 512, 1024, 2048)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.15), errors
    assert math.log2(errors[2] / errors[3]) == pytest.approx(2, abs=0.1), errors
    assert errors[0] < 0.7 * error(DDIM(diffusion.respaced(64)))


@pytest.mark.parametrize("num_steps", [27, 37, 111])
def test_dpm_solver_against_diffusers(num_steps: int):
    """These numbers divide 999, so all times are whole; diffusers' scheduler knows no others."""
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_dpmsolver_multistep")
    diffusion = build_diffusion(UVIT)
    scheduler = scheduling.DPMSolverMultistepScheduler(
        trained_betas=diffusion.betas.numpy(),
        solver_order=2,
        algorithm_type="dpmsolver++",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(timesteps=list(range(999, 0, -999 // num_steps)))

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(2 * x.flip(-1)) + t.double().reshape(-1, 1, 1, 1) / 1000

    # Their timesteps count from 0 and ours from 1.
    first = torch.randn(3, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = first
    for t in scheduler.timesteps:
        prediction = model(theirs, t.expand(3) + 1, labels(3))
        theirs = scheduler.step(prediction, t, theirs).prev_sample
    ours = sample(DPMSolver(diffusion, num_steps), model, labels(3), ImpulseNoise(first))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "declared", [UVIT, Diffusion()], ids=["fixed variance", "learned variance"]
)
def test_the_scheduler_of_diffusers_leads_where_the_flow_does(declared: Diffusion):
    pytest.importorskip("diffusers")
    diffusion = build_diffusion(declared)
    first = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    exact = gaussian(diffusion)
    times = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(t[0].item())
        return torch.cat([exact(x, t, y), torch.full_like(x, 7.0)][: 1 + diffusion.learned], dim=1)

    # At the end no noise is left.
    a = diffusion.alphas_cumprod[-1].sqrt()
    end = MEAN + STD * (first - a * MEAN) / (a**2 * STD**2 + 1 - a**2).sqrt()

    def error(num_steps: int) -> float:
        solver = DiffusersDPMSolver(diffusion, num_steps)
        return (sample(solver, model, labels(5), ImpulseNoise(first)) - end).abs().max().item()

    coarse = error(10)
    fine = error(100)
    assert fine < 0.02
    assert fine < coarse / 4

    # All times are whole, and both begin with the last one.
    assert len(times) == 110
    assert times[10] == 999 + declared.first_step
    assert all(time == int(time) for time in times)


def test_without_diffusers_its_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_multistep", None)
    noise = ImageNoise([0, 1], (1, 2, 2))
    with pytest.raises(ValueError, match="dpm_solver_diffusers needs diffusers: pip install"):
        sampler = bind_sampler(Sampler("dpm_solver_diffusers", num_steps=2), build_diffusion(UVIT))
        sample(sampler, lambda x, t, y: x, labels(2), noise)


def test_dpm_solver_is_guided_at_every_step_of_its_recipe():
    """Fifty steps at equal distances from 1000 down are all evaluated twice."""
    sampler = Sampler("dpm_solver", num_steps=50, scale=1.4, channels=None, interval=(0, 1001))
    times: list[float] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(t[0].item())
        return 0.1 * x

    # Two images by the recipe's own guidance.
    counted = CountingModel(model)
    guided = Guided(counted, sampler.scale, 10, channels=None, interval=sampler.interval)
    bound = bind_sampler(sampler, build_diffusion(UVIT))
    sample(bound, guided, labels(2), ImageNoise([0, 1], (1, 2, 2)))
    assert counted.evaluated / 2 == 100
    assert len(times) == 50
    assert times[0] == 1000
    assert min(times) > 1
    np.testing.assert_allclose(np.diff(times), -999 / 50, rtol=1e-4)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm_solver", "dpm_solver_diffusers"])
def test_an_image_depends_on_its_seed_and_not_on_the_batch(name: str):
    sampler = bind_sampler(Sampler(name, num_steps=7), build_diffusion(UVIT))
    seeds = [3, 4, 5, 6]

    def draw(start: int, stop: int) -> Tensor:
        noise = ImageNoise(seeds[start:stop], (1, 3, 5))
        return sample(sampler, lambda x, t, y: torch.sin(x.flip(-1)), labels(stop - start), noise)

    torch.testing.assert_close(torch.cat([draw(0, 1), draw(1, 4)]), draw(0, 4))


@pytest.mark.parametrize(
    "sampler, process, known",
    [
        (Sampler("heun"), Diffusion(), "ancestral, ddim, dpm_solver"),
        (Sampler(), Diffusion("flow"), "euler, heun, dopri5, sde"),
    ],
)
def test_a_sampler_of_another_process_is_refused_with_those_of_this_one(
    sampler: Sampler, process: Diffusion, known: str
):
    with pytest.raises(ValueError, match=f"known: {known}"):
        bind_sampler(sampler, build_diffusion(process))


def test_eta_reaches_ddim():
    def draw(eta: float) -> Tensor:
        sampler = bind_sampler(Sampler("ddim", num_steps=4, eta=eta), build_diffusion(UVIT))
        return sample(sampler, lambda x, t, y: 0.1 * x, labels(2), ImageNoise([0, 1], (1, 2, 2)))

    assert not torch.allclose(draw(0.0), draw(1.0))
