"""Between what networks see and 8-bit images: the range of values, and folded squares of pixels.

Folding moves every square of r x r pixels into channels, so that a network sees an image of 32 x 32
pixels as 16 x 16 places of 12 channels. Channel c, row i and column j of a square become channel
(c r + i) r + j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def fold(images: Tensor, side: int) -> Tensor:
    """Fold squares of pixels into channels: (N, C, H, W) -> (N, C side^2, H / side, W / side)."""
    return F.pixel_unshuffle(images, side)


def unfold(images: Tensor, side: int) -> Tensor:
    """Undo `fold`: (N, C side^2, h, w) -> (N, C, h side, w side)."""
    return F.pixel_shuffle(images, side)


def mirror(images: Tensor, side: int) -> Tensor:
    """Mirror images left to right, whose squares of this side are folded, (N, C, h, w)."""
    if side == 1:
        return images.flip(-1)
    # The places of a row change their order, and so do the columns within every square.
    n, channels, h, w = images.shape
    squares = images.reshape(n, channels // side, side, h, w)
    return squares.flip(2, 4).reshape(n, channels, h, w)
