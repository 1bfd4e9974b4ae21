"""Shifted-window attention with relative position bias: Liu et al., "Swin Transformer", ICCV 2021."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear, check_size


class WindowAttention(nn.Module):
    """Attention inside w x w windows; odd blocks roll by w/2 first. A window as large as the grid is one window, unshifted.

    A pair of tokens that the roll brought together from different regions gets -100 on its logit.
    """

    def __init__(
        self, dim: int, *, size: tuple[int, int], index: int, heads: int, window: int = 8
    ) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self.window = min(window, *size)
        self.shift = self.window // 2 if index % 2 and self.window < min(size) else 0
        if size[0] % self.window or size[1] % self.window or dim % heads:
            raise ValueError(
                f"window attention needs a grid divisible by its window and a width by its heads, got {size}, {window}, {dim}, {heads}"
            )
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("bias_index", _relative_index(self.window), persistent=False)
        self.register_buffer("mask", _shift_mask(size, self.window, self.shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        check_size(x, self.size, "window attention")
        w, h, e = self.window, self.heads, c // self.heads
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        rows, columns = height // w, width // w
        x = x.reshape(n, rows, w, columns, w, c).transpose(2, 3)  # (N, rows, columns, w, w, C)
        qkv = (
            self.qkv(x).view(n, rows * columns, w * w, 3, h, e).permute(3, 0, 1, 4, 2, 5)
        )  # 3 x (N, windows, h, w*w, e)
        q, k, v = qkv.flatten(2, 3)  # (N, windows*h, w*w, e)
        out = attention(q, k, v, self._bias())
        out = (
            out.view(n, rows * columns, h, w * w, e)
            .transpose(2, 3)
            .reshape(n, rows, columns, w, w, c)
        )
        out = self.proj(out.transpose(2, 3).reshape(n, height, width, c))  # (N, H, W, C)
        if self.shift:
            out = out.roll((self.shift, self.shift), dims=(1, 2))
        return out.permute(0, 3, 1, 2)

    def _bias(self) -> Tensor:
        """Relative position bias plus shift mask: (1, windows*h, w*w, w*w)."""
        bias = self.bias_table[self.bias_index].permute(2, 0, 1)  # (h, w*w, w*w)
        return (bias + self.mask[:, None]).flatten(0, 1)[None]


def _relative_index(window: int) -> Tensor:
    """Row of the bias table for every pair of positions in a window: (w*w, w*w)."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    offset = window - 1
    return (row[:, None] - row + offset) * (2 * window - 1) + column[:, None] - column + offset


def _shift_mask(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """0 where two tokens of a window come from one region of the unrolled grid, else -100: (windows, w*w, w*w)."""

    def bands(length: int) -> Tensor:
        position = torch.arange(length)
        return (
            (position >= length - window).long() + (position >= length - shift).long()
            if shift
            else position * 0
        )

    region = bands(size[0])[:, None] * 3 + bands(size[1])
    region = (
        region.view(size[0] // window, window, size[1] // window, window)
        .transpose(1, 2)
        .reshape(-1, window * window)
    )
    return (region[:, None] != region[:, :, None]).float() * -100.0
