"""Classifier-free guidance (arXiv:2207.12598), everywhere or in an interval (arXiv:2404.07724)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.diffusion.iddpm import Model

ALWAYS = (0, 1000)  # the interval that stands for all times, as specs declare it


class GuidedChannels(Enum):
    """A choice of guided channels that is no number."""

    OF_FAMILY = "the number that the network's family declares at its registration"


def guides_every_step(interval: tuple[float, float], times: tuple[float, float]) -> bool:
    """Tell whether an interval holds all times; `times` are the first and the last of them."""
    if interval == ALWAYS:
        return True
    return interval[0] <= times[0] and times[1] < interval[1]


@dataclass(frozen=True)
class RisingScale:
    """A guidance scale that rises from 1 at the noise to its largest value at the data, as DiMR's.

    largest: at time 0.
    power: 1 rises as a cosine; larger powers rise later.
    last_time: the timestep of pure noise.
    """

    largest: float
    power: float
    last_time: float

    def at(self, t: Tensor) -> Tensor:
        """Return the scale (N,1,1,1) at the times t (N,)."""
        share = (1 - t / self.last_time).clamp(0, 1) ** self.power
        rise = (1 - (math.pi * share).cos()) / 2
        return (1 + (self.largest - 1) * rise).reshape(-1, 1, 1, 1)


class Guided:
    """A network with classifier-free guidance: null + scale (conditional - null).

    It is called like the network itself. Only the leading output channels are guided; the others
    are the conditional ones. DiT and its descendants guide three of four latent channels.

    Guidance acts where interval[0] <= t < interval[1]. Where it acts on no image of the batch, and
    at scale 1, the network runs once on the plain batch. An interval that leaves out some time is
    compared with t at every step, which waits for the GPU.
    """

    def __init__(
        self,
        model: Model,
        scale: float | RisingScale,
        num_classes: int,
        *,
        channels: int | None | GuidedChannels = GuidedChannels.OF_FAMILY,
        interval: tuple[float, float] = ALWAYS,
        times: tuple[float, float] = (0, 999),
    ) -> None:
        """Wrap a network.

        Args:
            model: (x, t, y) -> prediction.
            scale: guidance scale, the same at all times or rising; 1 means no guidance.
            num_classes: number of classes, which is also the index of the null label.
            channels: number of leading channels to guide; None guides all. By default the
                network's family decides, and data with fewer channels are guided as a whole.
            interval: first time that is guided and first time after it that is not, in the
                timesteps that the network is given; (0, 1000) means all.
            times: the first and last timestep that the network is given.

        Raises:
            ValueError: `channels` is left out and the network is not a registered backbone, or
                there are no classes to guide by.
        """
        if not num_classes and scale != 1:
            raise ValueError(
                "an unconditional network has no labels to guide by; sample at scale 1"
            )
        self.model = model
        self.scale = scale
        self.null = num_classes

        # A network that is guided everywhere needs no test of the time at each step.
        self.interval = interval
        self.always = guides_every_step(interval, times)

        # By default, a family may guide only its leading channels, as its authors did.
        self.channels_of_family = isinstance(channels, GuidedChannels)
        self.channels: int | None
        if isinstance(channels, GuidedChannels):
            self.channels = _declared_channels(model)
        else:
            self.channels = channels

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N,C,H,W), (N,), (N,) -> (N,C_out,H,W)."""
        if self.scale == 1:
            return self.model(x, t, y)

        # Leave the null half out where no image is guided.
        low, high = self.interval
        inside = None if self.always else (low <= t) & (t < high)  # (N,)
        if inside is not None and not inside.any():
            return self.model(x, t, y)

        # One pass over the conditional and the null half together.
        num_guided = self._num_guided(x.shape[1])
        labels = torch.cat([y, torch.full_like(y, self.null)])  # (2N,)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), labels)  # (2N,C_out,H,W)
        conditional, null = both.chunk(2)  # (N,C_out,H,W) twice

        # Extrapolate the guided channels; the others stay conditional.
        eps_c = conditional[:, :num_guided]
        eps_u = null[:, :num_guided]
        guided = eps_u + self._scale_at(t) * (eps_c - eps_u)
        if inside is not None:
            guided = torch.where(inside.reshape(-1, 1, 1, 1), guided, eps_c)
        return torch.cat([guided, conditional[:, num_guided:]], dim=1)

    def _scale_at(self, t: Tensor) -> float | Tensor:
        """Return the scale at the times t (N,), one for all or (N,1,1,1)."""
        return self.scale.at(t) if isinstance(self.scale, RisingScale) else self.scale

    def _num_guided(self, channels: int) -> int:
        """Number of guided channels of data that have `channels`."""
        if self.channels is None:
            return channels
        if self.channels_of_family:
            return min(self.channels, channels)
        if self.channels > channels:
            raise ValueError(
                f"cannot guide {self.channels} channels of data that have {channels}; "
                "None guides all"
            )
        return self.channels


def _declared_channels(model: Model) -> int | None:
    if not isinstance(model, nn.Module):
        raise ValueError("only a registered backbone declares its guided channels; give `channels`")
    return backbones.guided_channels_of(model)
