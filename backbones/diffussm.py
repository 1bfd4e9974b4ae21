"""DiffuSSM: Yan et al., "Diffusion Models Without Attention", CVPR 2024.

Source: arXiv:2311.18257. A reconstruction: no code was published.

From the paper: no patches; dense layers on groups of M = 2 pixels in row-major order; the SSM on
all pixels; the layer's equations; 13 D^2 weights, which with M = 2 force a gated width of 1.5 D; a
D x D map at full length; D = 1152 and 29 layers.

Our choices: the place of that map (before the SSM), the exact GELU, LayerNorm without parameters,
one adaLN-Zero (shift, scale, gate) per layer, DiT's embedders and fixed positions, and the SSM
(S4D of 64 complex states, A shared by the channels, zero-order hold).

Legend: N batch, C channels, (H, W) input, L = HW pixels, M pixels of a group, J = L / M tokens,
D width, S states of a channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import diagonal_ssm
from backbones.layers import (
    LabelEmbedder,
    Linear,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register


class S4D(nn.Module):
    """Run a diagonal SSM over every channel and add a skip: (N, D, L) -> same.

    The states start at A = -1/2 + i pi n and the step sizes in [0.01, 1].
    """

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((states,), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states, dtype=torch.float32))
        self.log_dt = nn.Parameter(torch.empty(dim, 1).uniform_(math.log(0.01), 0.0))
        self.out = nn.Parameter(torch.randn(dim, states, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.ones(dim, 1))

    def forward(self, u: Tensor) -> Tensor:
        a = torch.complex(-self.log_decay.exp(), self.frequency)  # (S,)
        z = self.log_dt.exp() * a  # (D, S)
        w = torch.view_as_complex(self.out) * torch.expm1(z) / a  # (D, S)
        return diagonal_ssm(u, z, w) + self.skip * u  # (N, D, L)


class HourglassLayer(nn.Module):
    """Expand to pixels, scan both ways, contract to tokens and gate: (N, J, D) -> same.

    The layer is modulated and gated by adaLN-Zero.
    """

    def __init__(self, dim: int, group: int, states: int) -> None:
        super().__init__()
        self.group = group
        hidden = 3 * dim // 2
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.w0 = Linear(dim, dim)
        self.up = Linear(dim, group * dim)
        self.mix = Linear(dim, dim)
        self.ssm_forward = S4D(dim, states)
        self.ssm_backward = S4D(dim, states)
        self.down = nn.ModuleList(Linear(2 * dim, 2 * dim // group) for _ in range(group))
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(2 * dim, hidden)
        self.w3 = Linear(hidden, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)  # (N, 1, D)
        h = modulate(self.norm(x), shift, scale)  # (N, J, D)

        # Expand the tokens to their pixels.
        u = F.gelu(self.up(F.gelu(self.w0(h))))  # (N, J, M*D)
        u = u.unflatten(-1, (self.group, -1)).flatten(1, 2)  # (N, L, D)
        u = self.mix(u).mT  # (N, D, L)

        # Scan the pixels both ways.
        ahead = self.ssm_forward(u)  # (N, D, L)
        back = self.ssm_backward(u.flip(-1)).flip(-1)  # (N, D, L)
        y = torch.cat([ahead, back], dim=1)  # (N, 2D, L)

        # Contract the pixels of each token, every place in a group by its own layer.
        pixels = y.mT.unflatten(1, (-1, self.group)).unbind(dim=2)  # M x (N, J, 2D)
        contracted = [F.gelu(down(pixel)) for down, pixel in zip(self.down, pixels, strict=True)]
        y = torch.cat(contracted, dim=-1)  # (N, J, 2D)
        return gated(x, gate, self.w3(F.gelu(self.w2(y)) * F.gelu(self.w1(h))))  # (N, J, D)


class Head(nn.Module):
    """Apply adaLN and a linear layer to a group's pixels: (N, J, D), (N, D) -> (N, J, M*C_out)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # (N, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, J, M*C_out)


class DiffuSSM(nn.Module):
    """A stack of hourglass layers over groups of pixels."""

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 1152,
        depth: int = 29,
        group: int = 2,
        states: int = 64,
    ) -> None:
        super().__init__()
        if input_size % group or 2 * dim % group or dim % 4:
            raise ValueError(
                "DiffuSSM needs input_size and twice the dim divisible by group and dim by 4, "
                f"got input_size {input_size}, dim {dim}, group {group}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.group = group
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        grid = (input_size, input_size // group)

        self.x_embedder = Linear(group * in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(HourglassLayer(dim, group, states) for _ in range(depth))
        self.final_layer = Head(dim, group * self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.group, "DiffuSSM")
        size = x.shape[2:]
        x = x.flatten(2).mT.unflatten(1, (-1, self.group)).flatten(2)  # (N, J, M*C)
        x = self.x_embedder(x) + self.pos_embed  # (N, J, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, J, D)
        x = self.final_layer(x, c)  # (N, J, M*C_out)
        x = x.unflatten(-1, (self.group, -1)).flatten(1, 2)  # (N, L, C_out)
        return x.mT.unflatten(-1, size)  # (N, C_out, H, W)


register(
    DiffuSSM,
    dict(diffussm_xl=dict(dim=1152, depth=29)),
    tiny=dict(dim=12, depth=2, states=5),
    guided_channels=3,
    exceptions=Exceptions(frozen={"pos_embed": "positions are a fixed sine-cosine table"}),
)
