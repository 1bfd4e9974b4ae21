"""Shifted-window attention with relative position bias.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv:2103.14030.

Legend: N batch, C channels, (H, W) grid, w side of a window, P windows, L = w*w tokens of a window,
h heads, e = C / h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear, check_size


class WindowAttention(nn.Module):
    """Attend inside w x w windows: (N, C, H, W) -> same.

    Odd blocks roll the grid by w/2 first. The roll brings tokens of different regions into one
    window; such a pair gets -100 on its logit. A window as large as the grid is never rolled.
    """

    bias_index: Tensor  # row of the bias table for each pair of tokens: (L, L)
    mask: Tensor  # 0 or -100 for each pair of tokens: (P, L, L)

    def __init__(
        self, dim: int, *, size: tuple[int, int], index: int, heads: int, window: int = 8
    ) -> None:
        super().__init__()
        self.size = size
        self.heads = heads
        self.window = min(window, *size)

        # Odd layers shift their windows by half, so that neighbouring windows meet.
        rolls = index % 2 == 1 and self.window < min(size)
        self.shift = self.window // 2 if rolls else 0

        if size[0] % self.window or size[1] % self.window or dim % heads:
            raise ValueError(
                "window attention needs a grid divisible by its window and a width by its heads, "
                f"got {size}, {window}, {dim}, {heads}"
            )

        # A pair's bias depends on its offset, and the mask parts the rolled edges.
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("bias_index", _relative_index(self.window), persistent=False)
        self.register_buffer("mask", _shift_mask(size, self.window, self.shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        check_size(x, self.size, "window attention")
        n, c, height, width = x.shape
        w, h, e = self.window, self.heads, c // self.heads
        rows, columns = height // w, width // w
        windows = rows * columns

        # Cut the rolled grid into windows.
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        x = x.reshape(n, rows, w, columns, w, c).transpose(2, 3)  # (N, rows, columns, w, w, C)

        # Attend; the windows count as heads, each with its own bias.
        qkv = self.qkv(x).view(n, windows, w * w, 3, h, e)  # (N, P, L, 3, h, e)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 x (N, P*h, L, e)
        out = attention(q, k, v, self._bias())  # (N, P*h, L, e)

        # Put the windows back.
        out = out.view(n, windows, h, w * w, e).transpose(2, 3)  # (N, P, L, h, e)
        out = out.reshape(n, rows, columns, w, w, c).transpose(2, 3)  # (N, rows, w, columns, w, C)
        out = self.proj(out.reshape(n, height, width, c))  # (N, H, W, C)
        if self.shift:
            out = out.roll((self.shift, self.shift), dims=(1, 2))
        return out.permute(0, 3, 1, 2)  # (N, C, H, W)

    def _bias(self) -> Tensor:
        """Add relative position bias and shift mask: (1, P*h, L, L)."""
        bias = self.bias_table[self.bias_index].permute(2, 0, 1)  # (h, L, L)
        return (bias + self.mask[:, None]).flatten(0, 1)[None]


def _relative_index(window: int) -> Tensor:
    """Return the row of the bias table for every pair of positions in a window: (L, L)."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    offset = window - 1
    return (row[:, None] - row + offset) * (2 * window - 1) + column[:, None] - column + offset


def _shift_mask(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """Return 0 for a pair of tokens from one region of the unrolled grid, else -100: (P, L, L)."""
    height, width = size
    region = _bands(height, window, shift)[:, None] * 3 + _bands(width, window, shift)  # (H, W)
    region = region.view(height // window, window, width // window, window)
    region = region.transpose(1, 2).reshape(-1, window * window)  # (P, L)
    return (region[:, None] != region[:, :, None]).float() * -100.0


def _bands(length: int, window: int, shift: int) -> Tensor:
    """Number the regions along one side: 0, then 1 in the last window, then 2 in what wrapped."""
    position = torch.arange(length)
    if not shift:
        return position * 0
    return (position >= length - window).long() + (position >= length - shift).long()
