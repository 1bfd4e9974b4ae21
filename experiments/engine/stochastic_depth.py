"""Stochastic depth: Huang et al. (arXiv:1603.09382), for networks that take their increments' weights from outside.

A network that has it says by `drop_rates(largest)` how often each of its K increments is dropped, and is called with `kept`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def increment_weights(model: nn.Module, largest: float, num: int, noise: torch.Generator) -> Tensor:
    """(num, K): 0 for an increment that is dropped, else what makes up for those that are. ValueError for a network without increments."""
    if not hasattr(model, "drop_rates"):
        raise ValueError(
            f"{type(model).__name__} has no stochastic depth: drop_path of its recipe must be 0"
        )
    rates = torch.tensor(model.drop_rates(largest)).to(noise.device, non_blocking=True)
    return (torch.rand((num, len(rates)), generator=noise, device=noise.device) >= rates) / (
        1 - rates
    )
