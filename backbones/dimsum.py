"""DiMSUM: Phung et al., "DiMSUM: Diffusion Mamba - A Scalable and Unified Spatial-Frequency Method for Image Generation", NeurIPS 2024.

Legend: N batch, (G, G) grid of patches, T = G*G tokens, D width, E = D / 2 width of a branch, p patch, C channels.
Time runs from noise at 0 to data at 1 and is embedded as it is. As released: the residual stream is dropped at the end,
and the projection of the condition inside the mixers is dead. Stochastic depth, with which the authors train, is an input:
`kept` weighs each sample's increments to the stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.dit import SelfAttention
from backbones.kernels import attention
from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    sincos_position,
    unpatchify,
    xavier_flat_,
    zero_,
)
from backbones.mamba import (
    COLUMNS,
    COLUMNS_BACK,
    ROWS,
    ROWS_BACK,
    Mamba,
    float32_or_wider,
    mamba_init,
    reorder,
    restore,
)
from backbones.registry import register

_ORDERS = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)


class ConditionMamba(Mamba):
    """Mamba beside a projection of the condition that the checkpoints hold and nothing reads.

    The authors pass it as the initial state of the convolution; their kernel takes that tensor as its output buffer.
    """

    def __init__(self, dim: int, condition: int) -> None:
        super().__init__(dim)
        self.cond_proj = Linear(condition, 2 * dim).requires_grad_(False)


class SpatialBranch(nn.Module):
    """A modulated scan of the grid, its order changing from block to block: (N, T, E), c (N, D) -> (N, T, E)."""

    def __init__(self, dim: int, condition: int, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        self.grid, self.order = grid, _ORDERS[index % 4]
        self.mixer = ConditionMamba(dim, condition)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(condition, 3 * dim))

    def scan(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)
        return gated(x, gate, self.mixer(modulate(x, shift, scale)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return restore(self.scan(reorder(x, self.grid, self.order), c), self.grid, self.order)


class WaveletBranch(SpatialBranch):
    """The same on a two-level Haar packet of the grid, window by window."""

    def __init__(self, dim: int, condition: int, grid: tuple[int, int], index: int) -> None:
        super().__init__(dim, condition, grid, index)
        self.by_column = index % 2 == 1
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
        self.dwt, self.idwt = nn.Module(), nn.Module()
        for band, filters in zip(("ll", "lh", "hl", "hh"), signs, strict=True):
            self.dwt.register_buffer(f"w_{band}", filters.view(1, 1, 2, 2).clone())
        self.idwt.register_buffer("filters", signs.view(4, 1, 2, 2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = windows(self.packet(x), self.grid, self.by_column)  # (N, T, E)
        return self.unpacket(unwindows(self.scan(x, c), self.grid, self.by_column))

    def packet(self, x: Tensor) -> Tensor:
        """Both levels over 4, and the 16 bands dealt over the tokens of a cell, as `fold` does: (N, T, E) -> same."""
        filters = torch.cat([self.dwt.w_ll, self.dwt.w_lh, self.dwt.w_hl, self.dwt.w_hh]).flatten(1)
        bands = haar(
            haar(x.transpose(1, 2).unflatten(2, self.grid), filters), filters
        )  # (N, 16E, G/4, G/4): second, first
        return fold(bands.unflatten(1, (4, 4, -1)).transpose(1, 2).flatten(1, 3) / 4)

    def unpacket(self, x: Tensor) -> Tensor:
        filters = self.idwt.filters.flatten(1)
        bands = unfold(x * 4, self.grid).unflatten(1, (4, 4, -1)).transpose(1, 2).flatten(1, 3)
        return unhaar(unhaar(bands, filters), filters).flatten(2).transpose(1, 2)


def haar(x: Tensor, filters: Tensor) -> Tensor:
    """Bands of every 2x2 quad, band by band: (N, C, H, W), filters (band, pixel) -> (N, 4C, H/2, W/2)."""
    quads = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))
    return torch.einsum("bq,ncqhw->nbchw", filters, quads).flatten(1, 2)


def unhaar(x: Tensor, filters: Tensor) -> Tensor:
    """The inverse: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    quads = torch.einsum("bq,nbchw->ncqhw", filters, x.unflatten(1, (4, -1)))
    return F.pixel_shuffle(quads.flatten(1, 2), 2)


def fold(x: Tensor) -> Tensor:
    """16C channels of a grid of cells to 4x4 tokens a cell; token (p, q) takes channels 4p + q, 4p + q + 16, ...

    So every token holds a sixteenth of each band, not one band: (N, 16C, H, W) -> (N, 16*H*W, C).
    """
    return x.unflatten(1, (-1, 4, 4)).permute(0, 4, 2, 5, 3, 1).flatten(1, 4)


def unfold(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse: (N, T, C) -> (N, 16C, G/4, G/4)."""
    height, width = grid
    return x.unflatten(1, (height // 4, 4, width // 4, 4)).permute(0, 5, 2, 4, 1, 3).flatten(1, 3)


def windows(x: Tensor, grid: tuple[int, int], by_column: bool) -> Tensor:
    """4x4 windows one after the other; by column, both they and their tokens are column-major: (N, T, C) -> same."""
    x = x.unflatten(1, (4, grid[0] // 4, 4, grid[1] // 4))
    return (
        x.permute(0, 3, 1, 4, 2, 5).flatten(1, 4) if by_column else x.transpose(2, 3).flatten(1, 4)
    )


def unwindows(x: Tensor, grid: tuple[int, int], by_column: bool) -> Tensor:
    if by_column:
        return (
            x.unflatten(1, (4, 4, grid[1] // 4, grid[0] // 4))
            .permute(0, 2, 4, 1, 3, 5)
            .flatten(1, 4)
        )
    return x.unflatten(1, (4, 4, grid[0] // 4, grid[1] // 4)).transpose(2, 3).flatten(1, 4)


class CrossFusion(nn.Module):
    """Each branch asks the other: two (N, T, E) -> (N, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv1 = Linear(dim // 2, 3 * (dim // 2))
        self.qkv2 = Linear(dim // 2, 3 * (dim // 2))
        self.proj = Linear(dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, k1, v1 = self._split(self.qkv1(x1))  # (N, h, T, e)
        q2, k2, v2 = self._split(self.qkv2(x2))
        answers = attention(q1, k2, v2), attention(q2, k1, v1)
        return self.proj(
            torch.cat([answer.transpose(1, 2).flatten(2) for answer in answers], dim=-1)
        )

    def _split(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class GatedMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 8 * dim)
        self.w3 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.gelu(gate, approximate="tanh") * value)


class DiMSUMBlock(nn.Module):
    """h, r -> what both branches, their fusion and the MLP make of norm(r + h), and r + h. `kept` (N, 1, 1) weighs h."""

    def __init__(self, dim: int, fusion_heads: int, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.spatial_mamba = SpatialBranch(dim // 2, dim, grid, index)
        self.freq_mamba = WaveletBranch(dim // 2, dim, grid, index)
        self.proj = CrossFusion(dim, fusion_heads)
        self.norm_2 = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))

    def forward(
        self, h: Tensor, r: Tensor | None, c: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r = float32_or_wider(h) if r is None else r + (h if kept is None else h * kept)  # (N, T, D)
        u = self.norm(r)
        x1, x2 = u.chunk(2, dim=-1)  # (N, T, E)
        h = u + self.proj(self.spatial_mamba(x1, c), self.freq_mamba(x2, c))  # (N, T, D)
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)  # (N, 1, D)
        return gated(h, gate, self.mlp(modulate(self.norm_2(h), shift, scale))), r


class SharedBlock(nn.Module):
    """A DiT block with a gated MLP; one set of weights for all its places."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = GatedMlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(
            6, dim=-1
        )  # (N, 1, D)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)


class DiMSUM(nn.Module):
    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        patch: int = 2,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        fusion_heads: int = 8,
        attention_every: int = 4,
    ) -> None:
        super().__init__()
        if input_size % (4 * patch) or dim % 4 or dim % heads or dim // 2 % fusion_heads:
            raise ValueError(
                "DiMSUM needs input_size divisible by 4 patches, dim by 4 and by heads and half of it by fusion_heads, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}, fusion_heads {fusion_heads}"
            )
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid, self.attention_every = (
            (input_size // patch, input_size // patch),
            attention_every,
        )
        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid))
        self.blocks = nn.ModuleList(
            DiMSUMBlock(dim, fusion_heads, self.grid, i) for i in range(depth)
        )
        self.attn_block = SharedBlock(dim, heads)
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Only the modulation of the MLPs and of the head starts at zero: the branches and the shared block are open."""
        mamba_init(self, len(self.blocks))
        xavier_flat_(self.x_embedder.proj)
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero_(*(block.adaLN_modulation[1] for block in self.blocks))
        zero_(self.final_layer.adaLN_modulation[1], self.final_layer.linear)

    def drop_rates(self, largest: float) -> list[float]:
        """How often each of the K increments to the stream is dropped: rising with depth to just below the largest, as the authors have it."""
        depth = len(self.blocks)
        return [largest * i / (depth - 1) for i in range(depth - 1)]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` (N, K): what the increments to the stream are multiplied by, if not by 1."""
        check_grid(x, self.input_size, self.patch, "DiMSUM")
        h, r = self.x_embedder(x) + self.pos_embed, None  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for i, block in enumerate(self.blocks, start=1):
            weight = None if kept is None or r is None else kept[:, i - 2, None, None]
            h, r = block(h, r, c, weight)  # (N, T, D) twice
            if i % self.attention_every == 0:
                h = self.attn_block(h, c)  # (N, T, D)
        h = self.final_layer(h, c)  # (N, T, p*p*C_out)
        return unpatchify(h, self.grid, self.patch)  # (N, C_out, G*p, G*p)


register(
    DiMSUM,
    dict(
        dimsum_l_2=dict(dim=1024, depth=16),
        dimsum_xl_2=dict(dim=1152, depth=24),
    ),
    tiny=dict(dim=24, depth=4, heads=3, fusion_heads=3, attention_every=2),
)
