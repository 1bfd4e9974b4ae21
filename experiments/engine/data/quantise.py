"""The one way from network range to grey levels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, to uint8 as the published sets were made: trunc(clamp(127.5 v + 128, 0, 255)), half up.

    Source: ADM's and DiT's sampling scripts. Computed in float32. Raises ValueError where a value is not finite.
    """
    levels = images.float().mul(127.5).add_(128)
    if not torch.isfinite(levels).all():
        raise ValueError(
            "images hold values that are not finite; the network or the decoder that made them diverged"
        )
    return levels.clamp_(0, 255).to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """Grey levels 0..255 to float32 in [-1, 1]; `to_uint8` gives them back."""
    return levels.float().div(127.5).sub_(1)
