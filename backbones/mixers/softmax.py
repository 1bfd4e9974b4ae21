"""Multi-head self-attention over the whole grid: Vaswani et al., NeurIPS 2017."""

from __future__ import annotations

from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear


class SelfAttention(nn.Module):
    def __init__(self, dim: int, *, size: tuple[int, int], index: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"attention needs a width divisible by its heads, got {dim} and {heads}"
            )
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        q, k, v = (
            self.qkv(tokens).view(n, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )
        out = attention(q, k, v).transpose(1, 2).reshape(n, -1, c)  # (N, T, C)
        return self.proj(out).transpose(1, 2).reshape(n, c, height, width)
