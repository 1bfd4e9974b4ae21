"""Measure which channels of a layer are alive, and how much they repeat each other.

The activation of a channel is the mean over a map of relu(x), as in Figure 5 of the DiCo paper.
Here it is taken of the last layer's mixer, before its gate, and averaged over images.

N images, C channels, (H, W) grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones import dico
from backbones.block import Block
from backbones.dit import DiTBlock
from backbones.hourglass import Hourglass

NEAR_DEAD = 0.1  # share of the layer's mean activation below which a channel counts as near-dead


class Redundancy:
    """Activations and second moments of channels, summed up batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.relu = torch.zeros(0)
        self.sum = torch.zeros(0)
        self.squares = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Add a batch of maps (N, C, H, W) or of tokens (N, T, C)."""
        if not x.isfinite().all():
            raise ValueError(
                "the features are not finite; "
                "the network's weights have diverged or are of another network"
            )
        tokens = x.flatten(2).mT if x.ndim == 4 else x
        flat = tokens.double().flatten(0, 1).cpu()  # (N*T, C)

        if not self.count:
            channels = flat.shape[1]
            self.relu = flat.new_zeros(channels)
            self.sum = flat.new_zeros(channels)
            self.squares = flat.new_zeros(channels, channels)
        self.relu += flat.relu().sum(0)
        self.sum += flat.sum(0)
        self.squares += flat.mT @ flat
        self.count += len(flat)

    def activation(self) -> Tensor:
        """Return the mean of relu(x) per channel: (C,)."""
        return self.relu / self.count

    def covariance(self) -> Tensor:
        """Return the covariance of the channels: (C, C)."""
        mean = self.sum / self.count
        return self.squares / self.count - mean[:, None] * mean

    def scalars(self) -> dict[str, float]:
        """Return the figures that a record holds."""
        activation = self.activation()
        covariance = self.covariance()
        rank = effective_rank(covariance)
        return {
            "near_dead": (activation < NEAR_DEAD * activation.mean()).double().mean().item(),
            "effective_rank": rank,
            "relative_rank": rank / len(activation),
            "correlation": mean_correlation(covariance),
        }


def effective_rank(covariance: Tensor) -> float:
    """Return exp of the entropy of the centred features' singular values (Roy & Vetterli 2007).

    The singular values are the square roots of the covariance's eigenvalues.
    """
    singular = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    if not singular.sum() > 0:
        raise ValueError("the features do not vary; the layer is dead or the network untrained")
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def mean_correlation(covariance: Tensor) -> float:
    """Return the mean |correlation| over pairs of channels that vary."""
    # Leave out the channels that do not vary.
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    alive = deviation > 1e-9 * deviation.max()
    if alive.sum() < 2:
        raise ValueError("fewer than two channels vary; the layer is dead or the network untrained")
    covariance = covariance[alive][:, alive]
    deviation = deviation[alive]

    # Average over the pairs of different channels.
    correlation = (covariance / deviation / deviation[:, None]).abs()
    pairs = len(deviation) * (len(deviation) - 1)
    return ((correlation.sum() - correlation.trace()) / pairs).item()


def last_mixer(model: nn.Module) -> nn.Module:
    """Return the module whose output is that of the last layer's mixer.

    Raises:
        ValueError: if the blocks of the network's family are not known here.
    """
    # A network of one's own lists its mixers itself.
    if callable(getattr(model, "mixers", None)):
        return model.mixers()[-1]  # type: ignore[operator]

    known = (Block, DiTBlock, dico.DiCoBlock)
    blocks = [module for module in model.modules() if isinstance(module, known)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block whose mixer this probe knows; "
            "it takes DiCo, DiT, SiT, the stacks of Tables 3 and 4, and networks that list their "
            "mixers in a method mixers()"
        )

    # Each family keeps its mixer under another name.
    last = blocks[-1]
    if isinstance(last, Block):
        return last.mixer
    if isinstance(last, DiTBlock):
        return last.attn
    return last.conv3


def first_stage(model: nn.Module) -> nn.Module:
    """Return the last block of the first stage of a U-shape.

    Raises:
        ValueError: if the network has no stages, or is of a family that is not known here.
    """
    if isinstance(model, dico.DiCo):
        return model.encoder_level_1[-1]
    if isinstance(model, Hourglass):
        return model.encoder_1[-1]
    raise ValueError(
        f"{type(model).__name__} has no first stage; "
        "feature maps are of DiCo and the U-shapes of Tables 3 and 4"
    )


def record(
    model: nn.Module, module: nn.Module, walk: Callable[[Any], None], *, keep_maps: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Measure the output of a module on the network's way through S timesteps.

    Returns:
        Arrays: the timesteps (S,), the activations (S, C), each scalar (S,) and, with `keep_maps`,
        the first image's maps (S, C, H, W) as float16. And each scalar's mean over the timesteps.
    """
    timesteps: list[float] = []
    steps: list[Redundancy] = []
    maps: list[Tensor] = []

    def add_output(_: nn.Module, __: Any, out: Tensor) -> None:
        redundancy = Redundancy()
        redundancy.add(out)
        steps.append(redundancy)
        if keep_maps:
            maps.append(out[0].cpu())

    @torch.no_grad()
    def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        timesteps.append(float(t[0]))
        return model(x, t, y)

    # Let the network walk while its module is watched.
    handle = module.register_forward_hook(add_output)
    try:
        walk(watched)
    finally:
        handle.remove()

    # Arrays over the timesteps, and means.
    scalars = [step.scalars() for step in steps]
    series = {name: [scalar[name] for scalar in scalars] for name in scalars[0]}
    arrays = {
        "timesteps": np.array(timesteps),
        "activation": torch.stack([step.activation() for step in steps]).float().numpy(),
    }
    arrays |= {name: np.array(values, dtype=np.float32) for name, values in series.items()}
    if keep_maps:
        arrays["maps"] = torch.stack(maps).half().numpy()
    return arrays, {name: round(float(np.mean(values)), 5) for name, values in series.items()}
