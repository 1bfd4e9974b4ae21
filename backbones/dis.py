"""DiS: Fei et al., "Scalable Diffusion Models with State Space Backbone", 2024.

Legend: N batch, L patches, T = L + 2 tokens with the label's and the time's in front, D width, I = 2D, p patch, C channels.
Each block adds its input to a residual stream r in float32 and hands on what its mixer makes of r; the long skips carry
these increments and not the stream. Stochastic depth, with which the authors train, is an input: `kept` weighs each
sample's increments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
    check_grid,
    timestep_sinusoid,
    unpatchify,
)
from backbones.mamba import Mamba, float32_or_wider, mamba_init, selective_ssm
from backbones.registry import register


class BidirectionalMamba(Mamba):
    """A scan each way, with convolution, steps and states of its own, between shared projections."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        inner, projected = self.x_proj.in_features, self.x_proj.out_features
        self.conv1d_b = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj_b = Linear(inner, projected, bias=False)
        self.dt_proj_b = Linear(self.dt_proj.in_features, inner)
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.D_b = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (N, I, T)
        ahead = selective_ssm(
            x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D
        )  # (N, I, T)
        back = selective_ssm(
            x.flip(-1),
            z.flip(-1),
            self.conv1d_b,
            self.x_proj_b,
            self.dt_proj_b,
            self.A_b_log,
            self.D_b,
        )
        return self.out_proj((ahead + back.flip(-1)).transpose(1, 2))  # (N, T, D)


class DiSBlock(nn.Module):
    """h, r -> mixer(norm(r + h)), r + h; an out-block first merges a skip into h. `kept` (N, 1, 1) weighs h."""

    def __init__(self, dim: int, skip: bool = False) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(dim)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(
        self, h: Tensor, r: Tensor | None, skip: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if skip is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        r = float32_or_wider(h) if r is None else r + (h if kept is None else h * kept)
        return self.mixer(self.norm(r)), r


class DiS(nn.Module):
    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        patch: int = 2,
        dim: int = 368,
        depth: int = 24,
    ) -> None:
        """`depth` blocks in the two arms of the U together, and one between them."""
        super().__init__()
        if input_size % patch or depth % 2 or dim % 2:
            raise ValueError(
                f"DiS needs input_size divisible by patch and an even depth and dim, got input_size {input_size}, patch {patch}, depth {depth}, dim {dim}"
            )
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid = (input_size // patch, input_size // patch)
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.time_embed = nn.Sequential(Linear(dim, 4 * dim), nn.SiLU(), Linear(4 * dim, dim))
        self.label_emb = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], dim))
        self.in_blocks = nn.ModuleList(DiSBlock(dim) for _ in range(depth // 2))
        self.mid_block = DiSBlock(dim)
        self.out_blocks = nn.ModuleList(DiSBlock(dim, skip=True) for _ in range(depth // 2))
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        mamba_init(self, depth)

    def drop_rates(self, largest: float) -> list[float]:
        """How often each of the K increments to the stream is dropped: rising with depth, the last two alike, as the authors have it."""
        depth = len(self.in_blocks) + len(self.out_blocks)
        return [*(largest * i / (depth - 1) for i in range(depth)), largest]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` (N, K): what the increments to the stream are multiplied by, if not by 1."""
        check_grid(x, self.input_size, self.patch, "DiS")
        weights = iter(
            [None] * (len(self.in_blocks) + len(self.out_blocks) + 1)
            if kept is None
            else kept[..., None, None].unbind(1)
        )
        sinusoid = timestep_sinusoid(t, self.pos_embed.shape[-1])
        time, label = (
            self.time_embed(sinusoid.to(self.pos_embed.dtype)),
            self.label_emb(y),
        )  # (N, D)
        h = torch.cat([label[:, None], time[:, None], self.patch_embed(x)], dim=1)  # (N, T, D)
        h, r, skips = h + self.pos_embed, None, []
        for block in self.in_blocks:
            h, r = block(h, r, kept=None if r is None else next(weights))  # (N, T, D) twice
            skips.append(h)
        h, r = self.mid_block(h, r, kept=next(weights))
        for block in self.out_blocks:
            h, r = block(h, r, skips.pop(), next(weights))
        last = next(weights)
        h = self.norm_f(r + (h if last is None else h * last))
        h = self.final_layer(h, time + label)[:, 2:]  # (N, L, p*p*C_out)
        return unpatchify(h, self.grid, self.patch)  # (N, C_out, H, W)


register(
    DiS,
    dict(
        dis_s_2=dict(dim=368, depth=24),
        dis_b_2=dict(dim=768, depth=24),
        dis_m_2=dict(dim=768, depth=48),
        dis_l_2=dict(dim=1024, depth=48),
        dis_h_2=dict(dim=1536, depth=48),
    ),
    tiny=dict(dim=20, depth=4),
    guided_channels=3,
)
