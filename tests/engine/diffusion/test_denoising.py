"""The noise error at a signal-to-noise ratio is the same statement for every objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.denoising import log_snr_range, noise_mse, times_at
from experiments.engine.specs.spec import Diffusion

DISCRETE = [
    Diffusion(),
    Diffusion(betas="cosine"),
    Diffusion(betas="stable_diffusion", first_step=1),
]
FLOWS = [Diffusion("flow"), Diffusion("flow", path="gvp")]
LEVELS = torch.tensor([-3.7, -0.2, 0.0, 1.5, 4.9], dtype=torch.float64)


@pytest.mark.parametrize("spec", DISCRETE, ids=lambda spec: spec.betas)
def test_steps_of_a_schedule_lie_nearest_to_the_ratio(spec: Diffusion):
    process = build_diffusion(spec)
    signal, noise = process.signal**2, process.noise**2
    chosen = times_at(process, LEVELS)

    # the naive search over all steps is the truth
    for level, step in zip(LEVELS.tolist(), chosen.tolist(), strict=True):
        distances = [
            abs(math.log(signal[i].item() / noise[i].item()) - level)
            for i in range(process.num_steps)
        ]
        assert distances[step] == pytest.approx(min(distances), abs=1e-12)


def test_times_of_a_flow_have_the_ratio():
    linear, gvp = (build_diffusion(spec) for spec in FLOWS)
    # a = t, s = 1 - t, so that log SNR = 2 log(t / (1 - t))
    assert torch.allclose(times_at(linear, LEVELS).double(), torch.sigmoid(LEVELS / 2), atol=1e-7)
    # a = sin, s = cos of pi t / 2
    angle = torch.atan(torch.exp(LEVELS / 2))
    assert torch.allclose(times_at(gvp, LEVELS).double(), 2 / math.pi * angle, atol=1e-7)


@pytest.mark.parametrize("spec", [*DISCRETE, *FLOWS], ids=str)
def test_the_error_is_that_of_the_noise_whatever_is_predicted(spec: Diffusion):
    """A network that is wrong about the noise by 0.1 n has an error of its square."""
    process = build_diffusion(spec)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 3, 4, 5, generator=generator)
    eps = torch.randn(5, 3, 4, 5, generator=generator)
    offsets = 0.1 * torch.arange(1.0, 6.0)
    wrong = eps + offsets.reshape(-1, 1, 1, 1)
    times = times_at(process, LEVELS)

    # It says what it believes in the terms of its objective.
    def model(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if spec.name != "flow":
            return torch.cat([wrong, torch.zeros_like(wrong)], dim=1)
        a, s, da, ds = process.coefficients(times)
        clean = (x_t - s * wrong) / a
        return da * clean + ds * wrong

    error = noise_mse(process, model, x0, torch.zeros(5).long(), times, eps)
    assert torch.allclose(error, offsets**2, rtol=1e-3)


def test_the_range_of_a_schedule_is_that_of_its_ends():
    low, high = log_snr_range(build_diffusion(Diffusion()))
    assert high == pytest.approx(math.log((1 - 1e-4) / 1e-4))
    assert low < -10
    assert log_snr_range(build_diffusion(FLOWS[0])) == (-math.inf, math.inf)
