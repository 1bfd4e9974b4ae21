"""Squares of 2x2 pixels as channels, and back.

x (N, C, 2H, 2W) -> (N, 4C, H, W) by `pixel_unshuffle`, and the reverse by `pixel_shuffle`; channel
4c + 2i + j of a pixel is channel c of the square's row i and column j.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels import rows
from backbones.kernels.op import Choice, Op

SIDE = 2


class _Shuffle(torch.autograd.Function):
    """The gradient of either direction goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grows: bool) -> Tensor:
        ctx.grows = grows
        return _move(x, grows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _move(grad, not ctx.grows), None


def _move(x: Tensor, grows: bool) -> Tensor:
    n, c, h, w = x.shape
    # The gradient of a part of joined channels is read where it lies.
    apart = x.stride(3)
    if x.stride() != (h * w * apart, 1, w * apart, apart):
        x, apart = x.contiguous(memory_format=torch.channels_last), c

    if grows:
        y = x.new_empty(n, SIDE * h, SIDE * w, c // SIDE**2)
        rows.call("shuffle", x, y, n, h, w, c // SIDE**2, apart, channels=())
    else:
        y = x.new_empty(n, h // SIDE, w // SIDE, c * SIDE**2)
        rows.call("unshuffle", x, y, n, h // SIDE, w // SIDE, c, apart, channels=())
    return y.permute(0, 3, 1, 2)


def shuffle(x: Tensor) -> Tensor:
    """Make squares of pixels from channels."""
    return _Shuffle.apply(x, True)


def unshuffle(x: Tensor) -> Tensor:
    """Make channels from squares of pixels."""
    return _Shuffle.apply(x, False)


def _supports_shuffle(x: Tensor) -> bool:
    return rows.is_image(x) and x.shape[1] % SIDE**2 == 0


def _supports_unshuffle(x: Tensor) -> bool:
    return rows.is_image(x) and not any(side % SIDE for side in x.shape[2:])


pixel_shuffle = Op(
    "pixel_shuffle",
    [
        Choice("rows", shuffle, _supports_shuffle, rows.pays_in_threads),
        Choice("reference", partial(F.pixel_shuffle, upscale_factor=SIDE)),
    ],
)
pixel_unshuffle = Op(
    "pixel_unshuffle",
    [
        Choice("rows", unshuffle, _supports_unshuffle, rows.pays_in_threads),
        Choice("reference", partial(F.pixel_unshuffle, downscale_factor=SIDE)),
    ],
)
