"""The state before the first bad step of a training, kept without a copy of it.

From that step on the optimiser changes nothing, so the weights stay those that the step began with.
Images, times and noise of a step are functions of its position. Together they are the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.engine.runtime.group import Group


class Freeze:
    """Stops the updates of a fused optimiser at the first loss or gradient that is not finite.

    A GPU decides by itself, so that no step waits for it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: Group, device: torch.device):
        # An optimiser that is shared between processes steps by one of its own.
        self._optimizer: Any = getattr(optimizer, "optim", optimizer)
        self._group = group
        self._bad = torch.zeros((), device=device)
        self._step = torch.full((), -1, device=device)

    @property
    def step(self) -> int | None:
        """The step that was not made, counted from 0; None: every step was made."""
        step = int(self._step)
        return None if step < 0 else step

    def judge(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Freeze the weights if a step is bad. Every rank calls this before the update.

        Args:
            step: counted from 0.
            loss: this rank's share of the loss, 0-d.
            norm: of the gradient, which all ranks share, if it is known.
        """
        total = loss if norm is None else loss + norm
        bad = self._group.sum((~total.isfinite()).float()) > 0
        self._step = torch.where(bad & (self._step < 0), step, self._step)
        self._bad = torch.maximum(self._bad, bad.float())

        # The fused optimiser reads this flag on the device, as it does for a gradient scaler.
        self._optimizer.found_inf = self._bad
