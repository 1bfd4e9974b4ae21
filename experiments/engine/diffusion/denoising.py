"""Denoising at a given signal-to-noise ratio: one error for networks of every objective.

N images; a, s amplitudes of signal and noise in x_t = a x0 + s eps;  log SNR = log(a^2 / s^2)

A network that predicts a velocity v = a' x0 + s' eps is converted to the noise that it implies:
eps = (v - (a'/a) x_t) / (s' - (a'/a) s). The conversion is exact at the same signal-to-noise ratio.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from experiments.engine.diffusion.flow import Flow, velocity
from experiments.engine.diffusion.iddpm import IDDPM, Model, split_prediction


def log_snr_range(process: IDDPM | Flow) -> tuple[float, float]:
    """Return the lowest and highest log signal-to-noise ratio of a network's training."""
    if isinstance(process, Flow):
        return -math.inf, math.inf
    table = _log_snr_table(process)
    return table[-1].item(), table[0].item()


def times_at(process: IDDPM | Flow, log_snr: Tensor) -> Tensor:
    """Return the training times of these log signal-to-noise ratios.

    Args:
        process: a schedule of steps or a flow.
        log_snr: float64 (N,).

    Returns:
        (N,): long indices of a schedule's nearest steps, or float32 times in [0, 1] of a flow.
    """
    if isinstance(process, Flow):
        return _time_on_path(process, log_snr).float()
    distance = (_log_snr_table(process)[None, :] - log_snr[:, None]).abs()
    return distance.argmin(dim=1)


def noise_mse(
    process: IDDPM | Flow, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    """Return the mean squared error of the predicted noise of every image, (N,).

    Args:
        process: says what the network predicts.
        model: maps (x_t, t, y) to a prediction.
        x0: clean images (N, C, H, W).
        y: labels (N,).
        t: times (N,), as `times_at` gives them.
        eps: the noise to be predicted, (N, C, H, W).
    """
    if isinstance(process, Flow):
        a, s, da, ds = process.coefficients(t)
        x_t = a * x0 + s * eps
        predicted = (velocity(model, x_t, t, y) - da / a * x_t) / (ds - da / a * s)
    else:
        x_t = process.q_sample(x0, t, eps)
        predicted, _ = split_prediction(model(x_t, process.timesteps[t], y), x_t, process.learned)
    return ((predicted - eps) ** 2).mean(dim=(1, 2, 3))


def has_bound(process: IDDPM | Flow) -> TypeGuard[IDDPM]:
    """Return whether the variational bound can be measured: the network predicts a variance."""
    return isinstance(process, IDDPM) and process.learned


def step_weights(process: IDDPM, t: Tensor, log_snrs: tuple[int, int]) -> Tensor:
    """Return one over the share of the log SNRs between two ends that is nearest to each step.

    A mean over uniform log SNRs of a term, times this weight and summed over bins of unit width, is
    the sum of the term over all steps.

    Args:
        process: a schedule of steps.
        t: indices of steps (N,).
        log_snrs: the ends, which hold all steps between them.

    Raises:
        ValueError: a step lies outside.
    """
    table = _log_snr_table(process).cpu()  # falling
    low, high = log_snrs
    if table[-1] < low or table[0] > high:
        raise ValueError(
            f"the schedule's log SNR lies in {table[-1]:.1f} to {table[0]:.1f}, "
            f"and not within {low} to {high}"
        )
    # Half way between neighbours, the nearest step changes.
    middles = (table[1:] + table[:-1]) / 2
    uppers = torch.cat([table.new_tensor([high]), middles])
    lowers = torch.cat([middles, table.new_tensor([low])])
    return (1 / (uppers - lowers))[t.cpu()]


def prior_bits(process: IDDPM, x0: Tensor) -> float:
    """Return the divergence of the last noise level from pure noise, in bits per dimension."""
    signal = process.alphas_cumprod[-1].item()
    mean_square = x0.double().square().mean().item()
    variance = 1 - signal
    nats = 0.5 * (signal * mean_square + variance - 1 - math.log(variance))
    return nats / math.log(2)


def _log_snr_table(process: IDDPM) -> Tensor:
    """Return the log signal-to-noise ratio of every step, float64 (T,), falling."""
    return torch.log(process.alphas_cumprod / (1 - process.alphas_cumprod))


def _time_on_path(flow: Flow, log_snr: Tensor) -> Tensor:
    """Return the times (N,) at which a path has these ratios, rising with time, by bisection."""
    low = torch.zeros_like(log_snr)
    high = torch.ones_like(log_snr)
    for _ in range(60):  # halves the interval to less than a float64 resolves
        middle = (low + high) / 2
        a, s, _, _ = flow.coefficients(middle)
        too_noisy = 2 * (a.log() - s.log()).reshape(-1) < log_snr
        low = torch.where(too_noisy, middle, low)
        high = torch.where(too_noisy, high, middle)
    return (low + high) / 2
