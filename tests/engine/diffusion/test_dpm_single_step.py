"""DPM-Solver++(3S): its orders, its evaluations, and its convergence to a known flow."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.dpm_solvers import DPMSolver3S
from experiments.engine.diffusion.guidance import Guided, RisingScale
from experiments.engine.diffusion.iddpm import IDDPM, Model
from experiments.engine.diffusion.samplers import bind_sampler, has_uniform_steps
from experiments.engine.specs.spec import Diffusion, Sampler
from tests.support.flows import ImpulseNoise, labels, sample

MEAN = 0.3
STD = 0.7
DIMR = build_diffusion(Diffusion(betas="stable_diffusion", variance="fixed", first_step=1))
START = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(5, 1, 1, 1)


# A fine schedule whose log SNR falls evenly, on which few steps are enough to see an order.
CUMPROD = torch.linspace(6, -6, 20_000, dtype=torch.float64).sigmoid()
BETAS = 1 - CUMPROD / torch.cat([torch.ones(1, dtype=torch.float64), CUMPROD[:-1]])
EVEN = IDDPM(BETAS, torch.arange(1, 20_001), learned=False)


def gaussian(process: IDDPM) -> Model:
    """The expected noise of data N(MEAN, STD^2), whose flow is known."""
    log_a_of_steps = 0.5 * process.alphas_cumprod.log()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_a = np.interp(t.double().numpy() - 1, np.arange(process.num_steps), log_a_of_steps)
        a = torch.from_numpy(np.exp(log_a)).reshape(-1, 1, 1, 1)
        return (1 - a**2).sqrt() * (x - a * MEAN) / (a**2 * STD**2 + 1 - a**2)

    return model


@pytest.mark.parametrize(("remainder", "order"), [(2, 3), (1, 2), (0, 2)])
def test_it_converges_to_the_flow(remainder: int, order: int):
    """A last step of order 1 bounds the whole to order 2."""
    # Standardised deviations from the mean stay constant on the flow.
    a = EVEN.alphas_cumprod.sqrt()
    deviation = (a**2 * STD**2 + 1 - a**2).sqrt()
    end = a[0] * MEAN + deviation[0] * (START - a[-1] * MEAN) / deviation[-1]

    errors = []
    for evaluations in (144, 288, 576):
        solver = DPMSolver3S(EVEN, evaluations + remainder)
        x = sample(solver, gaussian(EVEN), labels(5), ImpulseNoise(START))
        errors.append((x - end).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.45), errors


@pytest.mark.parametrize(
    ("evaluations", "steps"), [(1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (50, 17), (250, 84)]
)
def test_every_evaluation_lies_on_the_even_grid(evaluations: int, steps: int):
    """50 evaluations are 16 steps of order 3 and one of order 2; 250 are 83 and one of order 1."""
    times: list[float] = []
    exact = gaussian(DIMR)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(t[0].item())
        return exact(x, t, y)

    spec = Sampler("dpm_solver_3s", num_steps=evaluations)
    xs = list(bind_sampler(spec, DIMR)(model, labels(5), ImpulseNoise(START)))
    assert len(xs) == steps
    assert times == pytest.approx(np.linspace(1000, 1, evaluations + 1)[:-1], abs=1e-3)
    assert not has_uniform_steps(spec, DIMR.times)


def test_a_power_lets_the_scale_rise_from_the_noise_to_the_data():
    """The scale is 1 at the last step, and the whole one at time 0."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where((y == 10).reshape(-1, 1, 1, 1), 0.0, 1.0).expand_as(x)

    guided = Guided(model, RisingScale(4.0, 2.0, 1000), 10, channels=None, times=(1, 1000))
    x, t = torch.zeros(4, 1, 1, 1), torch.tensor([1000.0, 500.0, 250.0, 0.0])
    scales = guided(x, t, torch.tensor([0, 1, 2, 3])).flatten()
    expected = [1 + 1.5 * (1 - math.cos(math.pi * (1 - n / 1000) ** 2)) for n in t.tolist()]
    assert scales.tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[-1] == 4.0
