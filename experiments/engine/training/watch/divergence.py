"""The watch over a training's loss and weights: what counts as diverged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from experiments.engine.numerics.parts import norms_of

SPIKE = 5.0  # a spike is this many times the usual loss
HISTORY = 20  # logged means whose median is the usual loss
FEWEST = 10  # logged means without which no loss is called usual


class Diverged(ValueError):
    """The loss or a weight is not finite, or the loss has jumped.

    Attributes:
        values: Step, batch and last good checkpoint, for the record.
    """

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


@dataclass(frozen=True)
class BadLoss:
    """The first bad loss in a list."""

    # Its place in the list.
    index: int
    # What is wrong with it, as the end of a sentence about the loss.
    problem: str


def find_bad_loss(losses: Sequence[float], means: Sequence[float]) -> BadLoss | None:
    """Return the first bad loss among the latest losses.

    Any loss that is not finite is bad. A spike is bad only if most of the latest losses are far
    above what was usual for long: single bad batches, noise and slow drifts pass.

    Args:
        losses: The latest losses, one for each step.
        means: The logged means before them.
    """
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            return BadLoss(index, f"is {loss}")

    usual = statistics.median(means[-HISTORY:]) if len(means) >= FEWEST else math.inf
    latest = statistics.median(losses) if losses else 0.0
    if latest > SPIKE * usual:
        index = next(index for index, loss in enumerate(losses) if loss > SPIKE * usual)
        return BadLoss(index, f"has jumped to {latest:.4g}, from {usual:.4g} before,")
    return None


def has_finite_weights(model: nn.Module) -> bool:
    """Return whether every weight is finite. A loss only tells of the weights before its update.

    Processes that share the network all call this.
    """
    return bool(norms_of(list(model.parameters())).isfinite().all())
