"""Between an autoencoder's latents and what a network sees; and what a config says of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from experiments.engine.records.files import read_json
from experiments.engine.specs.latent_space import SD_SPACE, LatentSpace

# Without one of these, a config does not say what its latents are.
NEEDED = ("latent_channels", "block_out_channels")
# Configs from before these fields are Stable Diffusion's, whose scale diffusers takes by itself.
LATER = ("scaling_factor", "shift_factor", "force_upcast")


def normalise(latents: ndarray, space: LatentSpace) -> None:
    """Turn latents (..., C, h, w) float32 into what a network sees, in place."""
    if any(space.shift):
        latents -= _array(space.shift)
    latents *= _array(space.scale)


def _array(values: tuple[float, ...]) -> ndarray | np.float32:
    if len(values) == 1:
        return np.float32(values[0])
    return np.array(values, np.float32)[:, None, None]


def denormalise(seen: Tensor, space: LatentSpace) -> Tensor:
    """Return the latents (N, C, h, w) of what a network sees."""
    latents = seen / _tensor(space.scale, seen)
    return latents + _tensor(space.shift, seen) if any(space.shift) else latents


def _tensor(values: tuple[float, ...], like: Tensor) -> Tensor | float:
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, device=like.device)[:, None, None]


def describe_space(space: LatentSpace | None, factor: int) -> dict[str, Any]:
    """Return what a plan says of latents; without a space, numbers are known only at the end."""
    if space is not None:
        return space.describe()
    words = {"scale": "1 / deviation of each channel", "shift": "mean of each channel"}
    return words | {"factor": factor}


def space_of_statistics(mean: ndarray, deviation: ndarray, factor: int) -> LatentSpace:
    """Return the space in which each channel of latents has mean 0 and deviation 1."""
    scale = tuple(float(f"{1 / value:.8g}") for value in deviation)
    return LatentSpace(scale, tuple(float(f"{value:.8g}") for value in mean), factor)


def space_of_config(path: Path) -> LatentSpace:
    """Return what the config of a diffusers AutoencoderKL says of its latents.

    Raises:
        ValueError: in one line, if it is that of another class or lacks a field.
    """
    config: dict[str, Any] = read_json(path, "copy the VAE again")
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"{path} is that of {name}; only AutoencoderKL of diffusers is read")
    missing = [field for field in NEEDED if config.get(field) is None]
    if config.get("scaling_factor") is None and not _is_old(config):
        missing.append("scaling_factor")
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}; add what its authors publish")

    # A few publish the mean and deviation of every channel, which the factor then scales.
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    scale = float(config.get("scaling_factor") or SD_SPACE.scale[0])
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean and deviation:
        return LatentSpace(
            tuple(scale / float(value) for value in deviation), tuple(map(float, mean)), factor
        )
    return LatentSpace((scale,), (float(config.get("shift_factor") or 0.0),), factor)


def _is_old(config: dict[str, Any]) -> bool:
    return config.get("latent_channels") == 4 and not any(field in config for field in LATER)
