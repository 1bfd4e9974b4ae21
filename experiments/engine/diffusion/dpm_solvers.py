"""DPM-Solver++ as iterators over its steps: multi-step of order 2, single-step of order 3.

Source: DPM-Solver++ (arXiv:2211.01095), in the prediction of clean data.

A sampler is built with its settings and called with (model, y, noise), as those of `samplers.py`.

N images, C channels; y (N,) labels; x = a x0 + s eps
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import IDDPM, Model, split_prediction
from experiments.engine.diffusion.noise import NoiseSource, noise_source
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly


@dataclass(frozen=True)
class _Grid:
    """Points that are even in time, from the noise to the data, each float64 (n,)."""

    # What the network is given.
    times: np.ndarray
    # Amplitudes of signal and noise.
    a: np.ndarray
    s: np.ndarray
    # Half the log of the signal-to-noise ratio.
    half_log_snr: np.ndarray

    def part(self, first: int, intervals: int) -> _Grid:
        """Return some neighbouring intervals."""
        cut = slice(first, first + intervals + 1)
        return _Grid(self.times[cut], self.a[cut], self.s[cut], self.half_log_snr[cut])


def _even_grid(diffusion: IDDPM, intervals: int) -> _Grid:
    """Return the grid from the last of a diffusion's steps to its first.

    Between the diffusion's steps, log a is linear.
    """
    indices = np.linspace(diffusion.num_steps - 1, 0, intervals + 1)
    log_a = np.interp(indices, np.arange(diffusion.num_steps), diffusion.log_signal)
    s = np.sqrt(-np.expm1(2 * log_a))
    times = indices + diffusion.times[0]
    return _Grid(times, np.exp(log_a), s, log_a - np.log(s))


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M), algorithm 2 of its paper, with a first step of order 1.

    Times are even, from the last of the diffusion's steps to its first. In between, the network is
    given fractions of timesteps. The noise of the first timestep stays in the sample, as U-ViT and
    DiM leave it.

    diffusion: not respaced.
    num_steps: number of steps, one evaluation each.
    launch: see above.
    """

    diffusion: IDDPM
    num_steps: int
    launch: Launch = run_eagerly

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step."""

        def step(x: Tensor, row: Tensor, y: Tensor, before: Tensor) -> Tensor:
            t, s, a, shrink, gain, order_2 = row.unbind()
            prediction = model(x, t.repeat(len(x)), y)
            eps, _ = split_prediction(prediction, x, self.diffusion.learned)
            x0_hat = (x - s * eps) / a  # (N,C,H,W)
            new = shrink * x - gain * (x0_hat + order_2 * (x0_hat - before))
            return torch.stack([new, x0_hat])

        launched = self.launch(step)
        x = noise_source(noise).draw()
        before = torch.zeros_like(x)  # has weight 0 in the first step
        for row in self._coefficients().to(x.device):
            x, before = launched(x, row, y, before)
            yield x

    def _coefficients(self) -> Tensor:
        """One row for each step, float32 (num_steps, 6): time, s, a, and weights of the update.

        x = a x0 + s eps; between the diffusion's steps log a is linear.
        """
        grid = _even_grid(self.diffusion, self.num_steps)
        a, s = grid.a, grid.s

        # The first step has order 1.
        h = np.diff(grid.half_log_snr)
        order_2 = np.append(0, h[1:] / h[:-1] / 2)

        shrink = s[1:] / s[:-1]
        gain = a[1:] * np.expm1(-h)
        rows = np.stack([grid.times[:-1], s[:-1], a[:-1], shrink, gain, order_2], axis=1)
        return torch.from_numpy(rows).float()


@dataclass(frozen=True)
class DPMSolver3S:
    """DPM-Solver++(3S): steps of order 3, each over three intervals of an even grid.

    The last step has order 1 or 2 where the evaluations do not divide by 3, and the last two have
    orders 2 and 1 where they do. DiMR samples so, and U-ViT with captions. As in `DPMSolver`, the
    network is given fractions of timesteps, and the noise of the first timestep stays.

    diffusion: not respaced.
    num_steps: number of evaluations.
    """

    diffusion: IDDPM
    num_steps: int

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step of one to three evaluations."""
        grid = _even_grid(self.diffusion, self.num_steps)
        x = noise_source(noise).draw()
        first = 0
        for order in _orders(self.num_steps):
            x = self._step(model, x, y, grid.part(first, order))
            first += order
            yield x

    def _step(self, model: Model, x: Tensor, y: Tensor, grid: _Grid) -> Tensor:
        """Make one step from the first to the last of two, three or four points of the grid.

        DPM-Solver++, algorithm 1 and appendix B; with points that are even in time, r1 and r2 are
        the shares of the step, in half the log SNR, at which the network is asked again.
        """
        a, s = grid.a, grid.s
        h = grid.half_log_snr - grid.half_log_snr[0]  # to each point
        phi = np.expm1(-h)

        def estimate(point: int, x: Tensor) -> Tensor:
            """Return the clean image (N,C,H,W) that the network implies at a point."""
            t = torch.full((len(x),), grid.times[point], dtype=torch.float32, device=x.device)
            eps, _ = split_prediction(model(x, t, y), x, self.diffusion.learned)
            return (x - float(s[point]) * eps) / float(a[point])

        def first_order(point: int) -> Tensor:
            """Return x at a point as a step of order 1 gives it."""
            return float(s[point] / s[0]) * x - float(a[point] * phi[point]) * clean

        clean = estimate(0, x)
        if len(h) == 2:
            return first_order(1)

        # A step of order 2 asks the network again at one inner point.
        change = estimate(1, first_order(1)) - clean
        if len(h) == 3:
            return first_order(2) - float(a[2] * phi[2] * h[2] / h[1] / 2) * change

        # A step of order 3 asks it at two.
        weight = (phi[2] / h[2] + 1) * h[2] / h[1]
        change = estimate(2, first_order(2) + float(a[2] * weight) * change) - clean
        weight = (phi[3] / h[3] + 1) * h[3] / h[2]
        return first_order(3) + float(a[3] * weight) * change


def _orders(evaluations: int) -> list[int]:
    """Return the orders of the steps, which add up to the evaluations."""
    threes, rest = divmod(evaluations, 3)
    if rest:
        return [3] * threes + [rest]
    return [3] * (threes - 1) + [2, 1]


@dataclass(frozen=True)
class DiffusersDPMSolver:
    """DPM-Solver++(2M) of the diffusers library, with the scheduler's defaults.

    It differs from `DPMSolver`, which is U-ViT's and DiM's, in its times, which are whole
    timesteps, and in its end, which is free of noise.

    diffusion: not respaced.
    num_steps: number of steps, one evaluation each.
    """

    diffusion: IDDPM
    num_steps: int

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step; ValueError if diffusers is not installed."""
        try:
            from diffusers.schedulers.scheduling_dpmsolver_multistep import (
                DPMSolverMultistepScheduler,
            )
        except ImportError:
            raise ValueError(
                "sampler dpm_solver_diffusers needs diffusers: pip install -e .[latents]"
            ) from None
        diffusion = self.diffusion
        scheduler = DPMSolverMultistepScheduler(
            diffusion.num_steps,
            trained_betas=diffusion.betas.cpu().numpy(),
            solver_order=2,
            algorithm_type="dpmsolver++",
        )

        # The library's scheduler makes the steps; only the prediction is ours.
        x = noise_source(noise).draw()
        scheduler.set_timesteps(self.num_steps)
        for i in scheduler.timesteps.tolist():
            t = diffusion.timesteps[i].repeat(len(x))  # (N,)
            eps, _ = split_prediction(model(x, t, y), x, diffusion.learned)
            x = scheduler.step(eps, i, x).prev_sample
            yield x
