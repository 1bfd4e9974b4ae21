from __future__ import annotations

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import Model

ALWAYS = (0, 1000)


def guides_every_step(interval: tuple[float, float], times: tuple[float, float]) -> bool:
    """Whether an interval holds all times, of which these are the first and the last."""
    return interval == ALWAYS or interval[0] <= times[0] and times[1] < interval[1]


class Guided:
    """A network with classifier-free guidance, null + scale (conditional - null), called like the network itself.

    Only the first `channels` outputs are guided, None meaning all C of eps; the others are the conditional ones. DiT
    and its descendants guide 3 of 4 latent channels. Guidance acts where interval[0] <= t < interval[1], and at every t
    by the interval (0, 1000) or one that holds all times; where it acts on no image, and at scale 1, the network runs once on
    the plain batch. Only an interval that leaves times out is compared with t, in every step, which waits for a GPU.
    """

    def __init__(
        self,
        model: Model,
        scale: float,
        num_classes: int,
        *,
        channels: int | None = 3,
        interval: tuple[float, float] = ALWAYS,
        times: tuple[float, float] = (0, 999),
    ):
        """num_classes: also the index of the null label; interval: in the timesteps that the network is given; times: the first and last of these."""
        self.model = model
        self.scale = scale
        self.null = num_classes
        self.channels = channels
        self.always = guides_every_step(interval, times)
        self.interval = interval

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N,C,H,W), (N,), (N,) -> (N,C_out,H,W)."""
        if self.scale == 1:
            return self.model(x, t, y)
        low, high = self.interval
        inside = None if self.always else (low <= t) & (t < high)  # (N,)
        if inside is not None and not inside.any():
            return self.model(x, t, y)
        num_guided = x.shape[1] if self.channels is None else self.channels
        if num_guided > x.shape[1]:
            raise ValueError(
                f"cannot guide {num_guided} channels of data that have {x.shape[1]}; None guides all"
            )
        labels = torch.cat([y, torch.full_like(y, self.null)])  # (2N,)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), labels)  # (2N,C_out,H,W)
        conditional, null = both.chunk(2)  # (N,C_out,H,W) twice
        eps_c, eps_u = conditional[:, :num_guided], null[:, :num_guided]
        guided = eps_u + self.scale * (eps_c - eps_u)
        if inside is not None:
            guided = torch.where(inside.reshape(-1, 1, 1, 1), guided, eps_c)
        return torch.cat([guided, conditional[:, num_guided:]], dim=1)
