"""Flow matching between noise and data: paths, the training loss, and the score behind a velocity.

Sources: SiT (arXiv:2401.08740) on stochastic interpolants (arXiv:2303.08797).

N batch, C channels
t (N,) time, from 0 (noise) to 1 (data); the network is given it as it is
x0 clean, eps noise, x_t = a(t) x0 + s(t) eps, velocity v = a'(t) x0 + s'(t) eps
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import Model

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]  # a, s, a', s'


def _linear(t: Tensor) -> Coefficients:
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def _gvp(t: Tensor) -> Coefficients:
    """The generalised variance-preserving path: a^2 + s^2 = 1."""
    rate = math.pi / 2
    a = (math.pi / 2 * t).sin()
    s = (math.pi / 2 * t).cos()
    return a, s, rate * s, -rate * a


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "gvp": _gvp}


class Flow:
    """A path from noise to data, its training loss and its score."""

    times = (0.0, 1.0)  # the first and last time that the network is given

    def __init__(self, path: str) -> None:
        self.path = PATHS[path]

    def to(self, device: torch.device | str) -> Flow:
        """Return self: a flow has no tables to move."""
        return self

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw uniform times (n,) on the generator's device."""
        return torch.rand(n, generator=generator, device=generator.device)

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute the squared error of the velocity per sample, as 'loss' and 'mse', each (N,)."""
        a, s, da, ds = self.coefficients(t)  # (N,1,1,1) each
        x_t = a * x0 + s * eps  # (N,C,H,W)
        v = da * x0 + ds * eps  # (N,C,H,W)
        mse = ((velocity(model, x_t, t, y) - v) ** 2).mean(dim=(1, 2, 3))  # (N,)
        return {"loss": mse, "mse": mse}

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Compute the gradient of the log density at x (N,C,H,W) from its velocity, for t < 1."""
        a, s, da, ds = self.coefficients(t)
        return (a * v - da * x) / (s * (da * s - a * ds))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Evaluate a, s, a' and s' at t (N,), each (N,1,1,1)."""
        return self.path(t.reshape(-1, 1, 1, 1))


def velocity(model: Model, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predict the velocity (N,C,H,W) in the precision of x.

    Raises:
        ValueError: the network predicts another number of channels than x has.
    """
    v = model(x, t, y)
    if v.shape != x.shape:
        raise ValueError(
            f"a flow needs a velocity of {x.shape[1]} channels, the prediction has {v.shape[1]}"
        )
    return v.to(x.dtype)
