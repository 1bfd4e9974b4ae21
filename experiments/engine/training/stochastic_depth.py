"""Stochastic depth: Huang et al. (arXiv:1603.09382), for networks that take such weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def increment_weights(
    model: nn.Module, largest_rate: float, num: int, noise: torch.Generator
) -> Tensor:
    """Draw a weight for each residual increment of each sample.

    Args:
        model: Its `drop_rates(largest_rate)` gives the rate of each of its K increments.
        largest_rate: Probability of dropping the increment that is dropped most.
        num: Samples in the batch.
        noise: Where the weights are drawn from, on its device.

    Returns:
        (num, K): 0 for a dropped increment, and 1 / (1 - rate) for one that stays.

    Raises:
        ValueError: The network has no such increments.
    """
    if not hasattr(model, "drop_rates"):
        raise ValueError(
            f"{type(model).__name__} has no stochastic depth: drop_path of its recipe must be 0"
        )
    drop_rates: Callable[[float], list[float]] = model.drop_rates  # type: ignore[assignment]
    rates = torch.tensor(drop_rates(largest_rate)).to(noise.device, non_blocking=True)
    draws = torch.rand((num, len(rates)), generator=noise, device=noise.device)
    return (draws >= rates) / (1 - rates)
