"""Between the networks' range of pixel values and 8-bit grey levels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images in [-1, 1] as the published sets were: trunc(clamp(127.5 v + 128, 0, 255)).

    Computed in float32, for any shape. Source: ADM's and DiT's sampling scripts.

    Raises:
        ValueError: a value is not finite.
    """
    levels = images.float().mul(127.5).add_(128)
    if not torch.isfinite(levels).all():
        raise ValueError(
            "images hold values that are not finite; the network or the decoder that made them "
            "diverged"
        )
    return levels.clamp_(0, 255).to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """Map grey levels 0..255 to float32 in [-1, 1]; `to_uint8` is the inverse."""
    return levels.float().div(127.5).sub_(1)
