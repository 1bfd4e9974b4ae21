"""Multi-head self-attention over the whole grid.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.

Legend: N batch, C channels, (H, W) grid, T = HW tokens.
"""

from __future__ import annotations

from torch import Tensor

from backbones.layers import SelfAttention


class SoftmaxAttention(SelfAttention):
    """Attend among all pixels of a grid: (N, C, H, W) -> same."""

    def __init__(self, dim: int, *, size: tuple[int, int], index: int, heads: int) -> None:
        if dim % heads:
            raise ValueError(
                f"attention needs a width divisible by its heads, got {dim} and {heads}"
            )
        super().__init__(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape)  # (N, C, H, W)
