"""Focused linear attention.

Source: Han et al., "FLatten Transformer", ICCV 2023, arXiv:2308.00442.

Legend: N batch, C channels, (H, W) grid, T = HW tokens, h heads, e = C / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import depthwise, linear_attention
from backbones.layers import Linear, check_size


class FocusedLinearAttention(nn.Module):
    """Attend linearly on focused features: (N, C, H, W) -> same.

    The feature map is f_p(u) = |u| u^p / |u^p| with u = (relu(x) + 1e-6) / softplus(sigma), p = 3.
    As in the authors' code, norms are over all channels, before the heads are split. A depthwise
    convolution of the values, shared by the heads, is added. `position` adds a trainable encoding
    to the keys.
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
                "focused linear attention needs a width divisible by its heads and an odd kernel, "
                f"got {dim}, {heads} and {kernel}"
            )

        self.size = size
        self.heads = heads
        self.power = power
        head_dim = dim // heads

        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.sigma = nn.Parameter(torch.zeros(1, 1, dim))

        # The depthwise kernel runs over each head's values, with one set of weights for all heads.
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel, padding=kernel // 2, groups=head_dim)
        self.position = nn.Parameter(torch.zeros(1, size[0] * size[1], dim)) if position else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # 3 x (N, T, C)
        if self.position is not None:
            check_size(x, self.size, "focused linear attention with position encoding")
            k = k + self.position

        # Linear attention of the focused features.
        scale = F.softplus(self.sigma)
        q = self._split(self._focus(q, scale))  # (N, h, T, e)
        k = self._split(self._focus(k, scale))  # (N, h, T, e)
        out = linear_attention(q, k, self._split(v))  # (N, h, T, e)
        out = out.transpose(1, 2).flatten(2)  # (N, T, C)

        # Depthwise convolution of the values, with one kernel for all heads.
        image = v.contiguous().transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)
        weight = self.dwc.weight.repeat(self.heads, 1, 1, 1)  # (C, 1, k, k)
        assert self.dwc.bias is not None
        local = depthwise(image, weight, self.dwc.bias.repeat(self.heads))  # (N, C, H, W)
        out = self.proj(out + local.flatten(2).transpose(1, 2))  # (N, T, C)
        return out.transpose(1, 2).reshape(x.shape)  # (N, C, H, W)

    def _focus(self, x: Tensor, scale: Tensor) -> Tensor:
        u = (F.relu(x) + 1e-6) / scale
        powered = u**self.power
        return powered * (u.norm(dim=-1, keepdim=True) / powered.norm(dim=-1, keepdim=True))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
