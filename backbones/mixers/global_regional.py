"""Attention to the own region and to a pooled image: a reconstruction of A-SDM's mixer.

Source: "A-SDM: Accelerating Stable Diffusion through Redundancy Removal and Performance
Optimization", arXiv:2312.15516, whose newer version its author withdrew. Its abstract names a
global-regional interactive attention and gives no formula; no code is public. Here one softmax
weighs all tokens of a query's region together with averages over the whole image.

Legend: N batch, C channels, (H, W) grid, w side of a region, R regions, L = w*w tokens of a region,
p side of the squares that are averaged, G = HW / p^2 averages, h heads, e = C / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear, check_size


class GlobalRegionalAttention(nn.Module):
    """Attend to a region of w x w and to averaged keys and values: (N, C, H, W) -> same."""

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int],
        index: int,
        heads: int,
        window: int = 16,
        pool: int = 4,
    ) -> None:
        super().__init__()
        self.size = size
        self.heads = heads
        self.window = min(window, *size)
        self.pool = min(pool, *size)
        if any(side % self.window or side % self.pool for side in size) or dim % heads:
            raise ValueError(
                "global-regional attention needs a grid divisible by its window and its pool and a "
                f"width by its heads, got {size}, {window}, {pool}, {dim}, {heads}"
            )

        # Both kinds of attention share their projections.
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        check_size(x, self.size, "global-regional attention")
        n, c, height, width = x.shape
        rows = height // self.window
        columns = width // self.window
        regions = rows * columns

        # Regions are samples of their own: (N R, h, L, e).
        qkv = self.qkv(x.permute(0, 2, 3, 1))  # (N, H, W, 3C)
        cut = qkv.view(n, rows, self.window, columns, self.window, 3 * c).transpose(2, 3)
        q, k, v = map(self._split, cut.reshape(n * regions, -1, 3 * c).chunk(3, dim=-1))

        # Averages of keys and values, the same for every region: (N R, h, G, e).
        pooled = F.avg_pool2d(qkv[..., c:].permute(0, 3, 1, 2), self.pool)  # (N, 2C, H/p, W/p)
        pooled = pooled.flatten(2).transpose(1, 2).repeat_interleave(regions, dim=0)
        global_k, global_v = map(self._split, pooled.chunk(2, dim=-1))

        # One softmax over both, then the regions go back to their places.
        keys = torch.cat([k, global_k], dim=2)  # (N R, h, L + G, e)
        values = torch.cat([v, global_v], dim=2)
        out = attention(q, keys, values).transpose(1, 2).flatten(2)  # (N R, L, C)
        out = out.view(n, rows, columns, self.window, self.window, c).transpose(2, 3)
        return self.proj(out.reshape(n, height, width, c)).permute(0, 3, 1, 2)  # (N, C, H, W)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
