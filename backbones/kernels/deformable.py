"""Weighted points of a map, sampled between its pixels (FlowDCN, arXiv:2410.22655).

out[n, r, c, g] = sum over k of weights[n, r, c, g, k] V[n, r + y, c + x, g], with (x, y) the k-th
point. V is bilinear in values, and pixels outside the map are worth 0.

values (N, H, W, G, e), points (N, H, W, G, K, 2) in pixels from the pixel itself, as (column, row),
weights (N, H, W, G, K) -> (N, H, W, G, e).

The authors' kernels find a point's cell by truncation towards zero, and so does this one. Between
-1 and 0 a point lies in the cell of pixels 0 and 1 and extrapolates from them. Between -2 and -1
pixel 0 counts with a negative share. The function jumps at -1 and at -2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.kernels.op import Choice, Op


def reference(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Add up the four pixels of every point's cell, at least in float32."""
    n, height, width, groups, channels = values.shape
    real = torch.promote_types(values.dtype, torch.float32)
    pixels = values.to(real).permute(0, 3, 1, 2, 4).reshape(-1, channels)  # (N G H W, e)
    points = points.to(real).movedim(3, 1)  # (N, G, H, W, K, 2)
    weights = weights.to(real).movedim(3, 1)  # (N, G, H, W, K)

    # Where each point lies, and where each image and group begins among the pixels.
    columns = torch.arange(width, device=values.device)[:, None] + points[..., 0]
    rows = torch.arange(height, device=values.device)[:, None, None] + points[..., 1]
    first = torch.arange(n * groups, device=values.device) * (height * width)
    first = first.view(n, groups, 1, 1, 1)

    out = torch.zeros(1, dtype=real, device=values.device)
    for row, row_share in _split_cell(rows, height):
        for column, column_share in _split_cell(columns, width):
            share = weights * row_share * column_share  # (N, G, H, W, K)
            place = first + row * width + column  # (N, G, H, W, K)
            taps = pixels.index_select(0, place.flatten()).view(*place.shape, channels)
            out = out + (share[..., None] * taps).sum(-2)  # (N, G, H, W, e)
    return out.movedim(1, 3).to(values.dtype)


def _split_cell(position: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two pixels of each position's cell along an axis, and each one's share.

    The share of a pixel outside is 0. Gradients hold the cell fixed.
    """
    cell = position.detach().trunc()
    fraction = position - cell
    ends = []
    for pixel, share in ((cell, 1 - fraction), (cell + 1, fraction)):
        inside = (pixel >= 0) & (pixel < length)
        # A diverged network's positions are no numbers; its output then is none either.
        index = pixel.nan_to_num().clamp(0, length - 1).long()
        ends.append((index, share * inside))
    return ends


def macs(values: Tensor, points: Tensor, weights: Tensor) -> int:
    """Count four taps and one weight for every point and channel."""
    return 5 * weights.numel() * values.shape[-1]


deformable = Op("deformable", [Choice("reference", reference)], macs=macs, sampling=True)
