"""Flow matching between noise and data: paths, training losses, and the score behind a velocity.

Sources: SiT (arXiv:2401.08740) on stochastic interpolants (arXiv:2303.08797); LightningDiT
(arXiv:2501.01423) and github.com/hustvl/LightningDiT at 2725fed for logit-normal times and the loss
of the direction.

N batch, C channels
t (N,) time, from 0 (noise) to 1 (data); the network is given it as it is
x0 clean, eps noise, x_t = a(t) x0 + s(t) eps, velocity v = a'(t) x0 + s'(t) eps
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)


def _logit_normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, device=generator.device).sigmoid()


DRAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
}


class Flow:
    """A path from noise to data, its training losses and its score."""

    times = (0.0, 1.0)  # the first and last time that the network is given

    def __init__(self, path: str, draw: str = "uniform", direction: float = 0.0) -> None:
        """Make a flow.

        Args:
            path: 'linear' or 'gvp'.
            draw: how training draws times, 'uniform' or 'logit_normal'.
            direction: weight of the loss of the velocity's direction.
        """
        self.path = PATHS[path]
        self.draw = DRAWS[draw]
        self.direction = direction

    def to(self, device: torch.device | str) -> Flow:
        """Return self: a flow has no tables to move."""
        return self

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what training calls in the place of a network: the network itself."""
        return network

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw times (n,) on the generator's device."""
        return self.draw(n, generator)

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute 'loss' = 'mse' + weight x 'direction' of each sample, each (N,).

        'direction' is the mean over pixels of 1 - cos of the angle between the predicted and the
        true velocity, as vectors of channels. It is absent if its weight is 0.
        """
        a, s, da, ds = self.coefficients(t)  # (N,1,1,1) each
        x_t = a * x0 + s * eps  # (N,C,H,W)
        v = da * x0 + ds * eps  # (N,C,H,W)
        predicted = velocity(model, x_t, t, y)
        mse = ((predicted - v) ** 2).mean(dim=(1, 2, 3))  # (N,)
        if self.direction == 0:
            return {"loss": mse, "mse": mse}

        direction = (1 - F.cosine_similarity(predicted, v, dim=1)).mean(dim=(1, 2))  # (N,)
        return {"loss": mse + self.direction * direction, "mse": mse, "direction": direction}

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
