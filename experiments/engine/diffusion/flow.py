"""Flow matching between noise and data: paths, training loss, and the score behind a velocity.

Sources: SiT (arXiv:2401.08740) on stochastic interpolants (arXiv:2303.08797). Time runs from noise at 0 to data at 1 and
is what the network is given.

N batch, C channels, t (N,) in [0, 1];  x0 clean, eps noise, x_t = a(t) x0 + s(t) eps, velocity v = a'(t) x0 + s'(t) eps
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import Model

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]  # a, s, a', s'


def _linear(t: Tensor) -> Coefficients:
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def _gvp(t: Tensor) -> Coefficients:
    """Generalised variance-preserving: a^2 + s^2 = 1."""
    a, s, rate = (math.pi / 2 * t).sin(), (math.pi / 2 * t).cos(), math.pi / 2
    return a, s, rate * s, -rate * a


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "gvp": _gvp}


class Flow:
    """A path and what follows from it."""

    times = 0.0, 1.0  # the first and last that the network is given

    def __init__(self, path: str):
        self.path = PATHS[path]

    def to(self, device: torch.device | str) -> "Flow":
        """Itself: there are no tables to move."""
        return self

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Uniform times (n,), on the generator's device."""
        return torch.rand(n, generator=generator, device=generator.device)

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Per-sample squared error of the velocity at times `t`, unweighted, as 'loss' and 'mse', (N,)."""
        a, s, da, ds = self.coefficients(t)  # (N,1,1,1) each
        x_t, v = a * x0 + s * eps, da * x0 + ds * eps  # (N,C,H,W)
        mse = ((velocity(model, x_t, t, y) - v) ** 2).mean(dim=(1, 2, 3))  # (N,)
        return {"loss": mse, "mse": mse}

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density of x_t (N,C,H,W) from the velocity there, for t < 1."""
        a, s, da, ds = self.coefficients(t)
        return (a * v - da * x) / (s * (da * s - a * ds))

    def coefficients(self, t: Tensor) -> Coefficients:
        """a, s, a', s' at t (N,), each (N,1,1,1)."""
        return self.path(t.reshape(-1, 1, 1, 1))


def velocity(model: Model, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network's (N,C,H,W), in the precision of x."""
    v = model(x, t, y)
    if v.shape != x.shape:
        raise ValueError(
            f"a flow needs a velocity of {x.shape[1]} channels, the prediction has {v.shape[1]}"
        )
    return v.to(x.dtype)
