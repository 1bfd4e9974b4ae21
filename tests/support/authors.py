"""Weights and inputs that are drawn from names, so that the authors' modules can have the same."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def draw_seeded(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers in float32 from a seed of numpy's PCG64."""
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(draw).float()


def draw_named(key: str, shape: tuple[int, ...], base: float, gain: float) -> Tensor:
    """Draw base + gain g in float64 from a parameter's name, and round to float32."""
    seed = zlib.crc32(key.encode())
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(base + gain * draw).float()


def digest_shapes(state: dict[str, Tensor]) -> str:
    """Return a digest of the names and shapes of a state_dict."""
    lines = sorted(f"{key} {list(value.shape)}" for key, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def largest_error(output: Tensor, sampled: dict[str, Any]) -> float:
    """Return the largest absolute error of an output at every `stride`-th value on file."""
    truth = torch.tensor(sampled["values"])
    return (output.flatten()[:: sampled["stride"]] - truth).abs().max().item()
