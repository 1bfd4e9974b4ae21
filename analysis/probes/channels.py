"""Which channels live, and how much they repeat each other.

Activation of a channel is the mean over a map of relu(x), as in Figure 5 of the DiCo paper; here of the last layer's mixer,
before its gate, averaged over images. N images, C channels, (H, W) grid.
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

NEAR_DEAD = 0.1  # of the mean activation of the layer


class Redundancy:
    """Streaming activations and second moments of channels: add (N, C, H, W) or tokens (N, T, C)."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(
                "the features are not finite; the network's weights have diverged or are of another network"
            )
        flat = (x.flatten(2).mT if x.ndim == 4 else x).double().flatten(0, 1).cpu()  # (N*T, C)
        if not self.count:
            self.relu, self.sum, self.squares = (
                flat.new_zeros(shape)
                for shape in (flat.shape[1:], flat.shape[1:], (flat.shape[1],) * 2)
            )
        self.relu += flat.relu().sum(0)
        self.sum += flat.sum(0)
        self.squares += flat.mT @ flat
        self.count += len(flat)

    def activation(self) -> Tensor:
        """Mean of relu(x) by channel: (C,)."""
        return self.relu / self.count

    def covariance(self) -> Tensor:
        mean = self.sum / self.count
        return self.squares / self.count - mean[:, None] * mean

    def scalars(self) -> dict[str, float]:
        activation, covariance = self.activation(), self.covariance()
        return {
            "near_dead": (activation < NEAR_DEAD * activation.mean()).double().mean().item(),
            "effective_rank": effective_rank(covariance),
            "relative_rank": effective_rank(covariance) / len(activation),
            "correlation": mean_correlation(covariance),
        }


def effective_rank(covariance: Tensor) -> float:
    """exp of the entropy of the singular values of the centred features, which are roots of eigenvalues (Roy & Vetterli 2007)."""
    singular = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    if not singular.sum() > 0:
        raise ValueError("the features do not vary; the layer is dead or the network untrained")
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def mean_correlation(covariance: Tensor) -> float:
    """Mean |correlation| over pairs of channels that vary."""
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    alive = deviation > 1e-9 * deviation.max()
    if alive.sum() < 2:
        raise ValueError("fewer than two channels vary; the layer is dead or the network untrained")
    covariance, deviation = covariance[alive][:, alive], deviation[alive]
    correlation = (covariance / deviation / deviation[:, None]).abs()
    return (
        (correlation.sum() - correlation.trace()) / (len(deviation) * (len(deviation) - 1))
    ).item()


def last_mixer(model: nn.Module) -> nn.Module:
    """The module that puts out the last layer's mixer; ValueError for families whose blocks are not known here."""
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, Block | DiTBlock | dico.DiCoBlock)
    ]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block whose mixer is known to this probe; it takes DiCo, DiT, SiT and the stacks of Tables 3 and 4"
        )
    last = blocks[-1]
    return (
        last.mixer
        if isinstance(last, Block)
        else last.attn
        if isinstance(last, DiTBlock)
        else last.conv3
    )


def first_stage(model: nn.Module) -> nn.Module:
    """The last block of the first stage of a U-shape; ValueError where there is none."""
    if isinstance(model, dico.DiCo):
        return model.encoder_level_1[-1]
    if isinstance(model, Hourglass):
        return model.encoder_1[-1]
    raise ValueError(
        f"{type(model).__name__} has no first stage; feature maps are of DiCo and the U-shapes of Tables 3 and 4"
    )


def record(
    model: nn.Module, module: nn.Module, walk: Callable[[Any], None], *, keep_maps: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a module puts out on the network's way through S steps: activations (S, C) and, if kept, the first image's maps

    (S, C, H, W) as float16; scalars of each step and, second, their means.
    """
    timesteps: list[float] = []
    steps: list[Redundancy] = []
    maps: list[Tensor] = []

    def see(_: nn.Module, __: Any, out: Tensor) -> None:
        steps.append(Redundancy())
        steps[-1].add(out)
        maps.extend([out[0].cpu()] if keep_maps else [])

    @torch.no_grad()
    def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        timesteps.append(float(t[0]))
        return model(x, t, y)

    handle = module.register_forward_hook(see)
    try:
        walk(watched)
    finally:
        handle.remove()
    scalars = [step.scalars() for step in steps]
    arrays = {
        "timesteps": np.array(timesteps),
        "activation": torch.stack([step.activation() for step in steps]).float().numpy(),
    }
    arrays |= {
        name: np.array([scalar[name] for scalar in scalars], dtype=np.float32)
        for name in scalars[0]
    }
    if keep_maps:
        arrays["maps"] = torch.stack(maps).half().numpy()
    return arrays, {
        name: round(float(np.mean([scalar[name] for scalar in scalars])), 5) for name in scalars[0]
    }
