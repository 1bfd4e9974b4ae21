"""Focused linear attention: Han et al., "FLatten Transformer", ICCV 2023."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import linear_attention
from backbones.layers import Linear, check_size


class FocusedLinearAttention(nn.Module):
    """Linear attention on focused features, plus a depthwise convolution of the values shared by the heads.

    f_p(u) = |u| u^p / |u^p| with u = (relu(x) + 1e-6) / softplus(sigma), p = 3, norms over all channels, before the
    heads are split (as in the authors' code). `position` adds their trainable encoding to the keys.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int],
        index: int,
        heads: int,
        power: int = 3,
        kernel: int = 5,
        position: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads or kernel % 2 == 0:
            raise ValueError(
                f"focused linear attention needs a width divisible by its heads and an odd kernel, got {dim}, {heads} and {kernel}"
            )
        self.size, self.heads, self.power = size, heads, power
        head_dim = dim // heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.sigma = nn.Parameter(torch.zeros(1, 1, dim))
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel, padding=kernel // 2, groups=head_dim)
        self.position = nn.Parameter(torch.zeros(1, size[0] * size[1], dim)) if position else None

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            check_size(x, self.size, "focused linear attention with position encoding")
        n, c, height, width = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # (N, T, C)
        if self.position is not None:
            k = k + self.position
        scale = F.softplus(self.sigma)
        q, k, v = (
            self._split(part) for part in (self._focus(q, scale), self._focus(k, scale), v)
        )  # (N, h, T, e)
        out = linear_attention(q, k, v)  # (N, h, T, e)
        local = self.dwc(
            v.transpose(-2, -1).reshape(n * self.heads, -1, height, width)
        )  # (N*h, e, H, W)
        out = out.transpose(-2, -1).reshape(n, c, height, width) + local.reshape(
            n, c, height, width
        )
        return (
            self.proj(out.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, height, width)
        )

    def _focus(self, x: Tensor, scale: Tensor) -> Tensor:
        u = (F.relu(x) + 1e-6) / scale
        powered = u**self.power
        return powered / powered.norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
