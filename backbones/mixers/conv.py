"""DiCo's conv module with the variations of Table 4: kernel, activation and channel attention.

Source: arXiv:2505.11196, equation 3 and Table 4.

Legend: N batch, C channels, (H, W) grid, T = HW pixels, h heads, e = C / h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import channel_attention, depthwise, depthwise_gelu, pool, scale
from backbones.layers import Pointwise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class ConvModule(nn.Module):
    """Apply 1x1, depthwise k x k, activation, channel attention, 1x1: (N, C, H, W) -> same.

    `channel` is 'cca', 'none', 'se' (with `reduction`) or 'mdta' (with `heads`, and with `project`
    for its output projection).
    """

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int],
        index: int,
        kernel: int = 3,
        activation: str = "gelu",
        channel: str = "cca",
        reduction: int = 8,
        heads: int = 1,
        project: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        if kernel % 2 == 0:
            raise ValueError(f"a depthwise kernel has an odd side, got {kernel}")

        self.activation = ACTIVATIONS[activation]
        self.pointwise_in = Pointwise(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.channel = _channel_attention(channel, dim, reduction, heads, project)
        self.pointwise_out = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise_in(x)  # (N, C, H, W)
        if self.activation is F.gelu:
            x = depthwise_gelu(x, self.depthwise.weight, self.depthwise.bias)
        else:
            x = self.activation(depthwise(x, self.depthwise.weight, self.depthwise.bias))
        return self.pointwise_out(self.channel(x))  # (N, C, H, W)


def _channel_attention(
    channel: str, dim: int, reduction: int, heads: int, project: bool
) -> nn.Module:
    if channel == "cca":
        return CompactChannelAttention(dim)
    if channel == "se":
        return SqueezeExcitation(dim, reduction)
    if channel == "mdta":
        return ChannelSelfAttention(dim, heads, project)
    if channel == "none":
        return nn.Identity()
    raise ValueError(f"unknown channel attention {channel!r}; known: cca, none, se, mdta")


class CompactChannelAttention(nn.Module):
    """Compute x sigmoid(W GAP(x)): DiCo, equation 3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return scale(x, self.weight(pool(x)).sigmoid())


class SqueezeExcitation(nn.Module):
    """Compute x sigmoid(W_b relu(W_a GAP(x))).

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        if not 1 <= reduction <= dim:
            raise ValueError(
                "squeeze-and-excitation needs a reduction from 1 to the width "
                f"{dim}, got {reduction}"
            )
        self.squeeze = Pointwise(dim, dim // reduction)
        self.excite = Pointwise(dim // reduction, dim)

    def forward(self, x: Tensor) -> Tensor:
        return scale(x, self.excite(F.relu(self.squeeze(pool(x)))).sigmoid())


class ChannelSelfAttention(nn.Module):
    """Attend among the channels of each head.

    Source: MDTA of Zamir et al., "Restormer", CVPR 2022. Its output projection is left out by
    default, because the conv module's 1x1 convolution follows at once (a reconstruction).
    """

    def __init__(self, dim: int, heads: int, project: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"channel attention needs a width divisible by its heads, got {dim} and {heads}"
            )
        self.heads = heads
        self.qkv = Pointwise(dim, 3 * dim, bias=False)
        self.depthwise = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project = Pointwise(dim, dim, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        qkv = depthwise(self.qkv(x), self.depthwise.weight)  # (N, 3C, H, W)
        qkv = qkv.flatten(2).view(n, 3, self.heads, c // self.heads, -1)  # (N, 3, h, e, T)

        # Queries and keys count by their directions: their norms over the grid divide the logits.
        norms = qkv[:, :2].square().sum(-1, keepdim=True).sqrt()  # (N, 2, h, e, 1)
        norms = norms.clamp_min(1e-12).unbind(1)
        h = channel_attention(*qkv.unbind(1), *norms, self.temperature)  # (N, h, e, T)
        return self.project(h.reshape(x.shape))  # (N, C, H, W)
