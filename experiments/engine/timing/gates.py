"""How much faster a trained network with gates is if it computes only what they leave on.

The share of work that gates leave on depends on the weights, so a network is timed where it is
scored, and not from fresh weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.objectives import HasGates
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.timing.clock import half_interquartile_range, time_call

ROUNDS = 3
BATCH = 64  # images of one time

Path = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def time_gates(
    network: HasGates, process: IDDPM, num_steps: int, x0: Tensor, y: Tensor
) -> dict[str, float]:
    """Time the paths of a network with gates at all times of a sampler, each path in turn.

    Images are true ones with the noise of the time. A round is one evaluation at each time.

    Args:
        network: in evaluation mode.
        process: as it is trained.
        num_steps: of the sampler.
        x0: images (N, C, H, W) on the device, of which the first are taken.
        y: their labels (N,).

    Returns:
        For a record: seconds of a round without gates, and how many times as fast the gathered and
        the masked path are, as medians over the rounds with their spreads.
    """
    x0, y = x0[:BATCH], y[:BATCH]
    eps = torch.randn(x0.shape, generator=generator_at("time gates")).to(x0.device)
    respaced = process.respaced(num_steps)
    paths: dict[str, Path] = {
        "complete": network.forward_complete,
        "gathered": network.forward_gathered,
        "masked": lambda x, t, y: network.forward_with_share(x, t, y)[0],
    }

    # The first round warms up.
    rounds = [_time_round(paths, respaced, x0, y, eps) for _ in range(ROUNDS + 1)][1:]
    values = {"timed_batch": float(len(x0))}
    seconds = [times["complete"] for times in rounds]
    values |= {"complete_s": statistics.median(seconds)}
    for name in ("gathered", "masked"):
        ratios = [times["complete"] / times[name] for times in rounds]
        values[f"{name}_speed_up"] = statistics.median(ratios)
        values[f"{name}_speed_up_spread"] = half_interquartile_range(ratios)
    return values


def _time_round(
    paths: dict[str, Path], process: IDDPM, x0: Tensor, y: Tensor, eps: Tensor
) -> dict[str, float]:
    """Return the seconds that each path takes for one evaluation at each time."""
    seconds = dict.fromkeys(paths, 0.0)
    for index in range(process.num_steps):
        at = torch.full((len(x0),), index, device=x0.device)
        x = process.q_sample(x0, at, eps).to(x0.dtype)
        t = process.timesteps.to(x0.device)[at]
        for name, path in paths.items():
            seconds[name] += time_call(partial(path, x, t, y), x0.device)
    return seconds
