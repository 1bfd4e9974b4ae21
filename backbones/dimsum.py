"""DiMSUM: Phung et al., "DiMSUM: Diffusion Mamba - A Scalable and Unified Spatial-Frequency Method
for Image Generation", NeurIPS 2024.

Source: arXiv:2411.04168 and github.com/VinAIResearch/DiMSUM.

Time runs from noise at 0 to data at 1 and is embedded as it is. Two things are as released: the
residual stream is dropped at the end, and the projection of the condition inside the mixers does
nothing. The authors train with stochastic depth; here it is an input: `kept` weighs each sample's
increments to the stream.

Legend: N batch, C channels, p patch, (G, G) grid of patches, T = G*G tokens, D width, E = D / 2
width of a branch, h heads, e width of a head, K increments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.dis import add_increment
from backbones.kernels import attention
from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
    SelfAttention,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    unpatchify,
    xavier_flat_,
    zero_,
    zero_modulation,
)
from backbones.mamba import (
    COLUMNS,
    COLUMNS_BACK,
    ROWS,
    ROWS_BACK,
    Mamba,
    mamba_init,
    reorder,
    restore,
)
from backbones.positions import resize_positions, sincos_position
from backbones.registry import Exceptions, register

_ORDERS = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)


class ConditionMamba(Mamba):
    """Mamba beside a projection of the condition that the checkpoints hold and nothing reads.

    The authors pass it as the initial state of the convolution. Their kernel takes that tensor as
    its output buffer and overwrites it.
    """

    def __init__(self, dim: int, condition: int) -> None:
        super().__init__(dim)
        self.cond_proj = Linear(condition, 2 * dim).requires_grad_(False)


class SpatialBranch(nn.Module):
    """Scan the grid in an order that changes from block to block: (N, T, E), (N, D) -> (N, T, E).

    The scan is modulated and gated by adaLN-Zero.
    """

    def __init__(self, dim: int, condition: int, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        self.grid = grid
        self.order = _ORDERS[index % 4]
        self.mixer = ConditionMamba(dim, condition)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(condition, 3 * dim))

    def scan(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)  # (N, 1, E)
        return gated(x, gate, self.mixer(modulate(x, shift, scale)))  # (N, T, E)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.scan(reorder(x, self.grid, self.order), c)  # (N, T, E)
        return restore(x, self.grid, self.order)


class WaveletBranch(SpatialBranch):
    """Scan a two-level Haar packet of the grid, window by window, as the spatial branch scans."""

    def __init__(self, dim: int, condition: int, grid: tuple[int, int], index: int) -> None:
        super().__init__(dim, condition, grid, index)
        self.by_column = index % 2 == 1
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2

        # The checkpoints hold the filters of the transform band by band, and of its inverse as one.
        self.dwt = nn.Module()
        self.idwt = nn.Module()
        for band, filters in zip(("ll", "lh", "hl", "hh"), signs, strict=True):
            self.dwt.register_buffer(f"w_{band}", filters.view(1, 1, 2, 2).clone())
        self.idwt.register_buffer("filters", signs.view(4, 1, 2, 2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = windows(self.packet(x), self.grid, self.by_column)  # (N, T, E)
        return self.unpacket(unwindows(self.scan(x, c), self.grid, self.by_column))

    def packet(self, x: Tensor) -> Tensor:
        """Transform the grid twice, divide by 4, and fold the 16 bands: (N, T, E) -> same."""
        filters = torch.cat(list(self.dwt.buffers())).flatten(1)  # (4 bands, 4 pixels)
        image = x.transpose(1, 2).unflatten(2, self.grid)  # (N, E, G, G)
        bands = haar(haar(image, filters), filters)  # (N, 16E, G/4, G/4), second level first
        return fold(_swap_levels(bands) / 4)  # (N, T, E)

    def unpacket(self, x: Tensor) -> Tensor:
        """Undo `packet`."""
        (filters,) = self.idwt.buffers()
        filters = filters.flatten(1)  # (4 bands, 4 pixels)
        bands = _swap_levels(unfold(x * 4, self.grid))  # (N, 16E, G/4, G/4)
        return unhaar(unhaar(bands, filters), filters).flatten(2).transpose(1, 2)  # (N, T, E)


def _swap_levels(bands: Tensor) -> Tensor:
    """Exchange the two levels in the order of the 16 bands: (N, 16E, ...) -> same."""
    return bands.unflatten(1, (4, 4, -1)).transpose(1, 2).flatten(1, 3)


def haar(x: Tensor, filters: Tensor) -> Tensor:
    """Transform every 2x2 quad, band by band: (N, C, H, W) -> (N, 4C, H/2, W/2).

    `filters` is (4 bands, 4 pixels of a quad).
    """
    quads = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))  # (N, C, 4, H/2, W/2)
    return torch.einsum("bq,ncqhw->nbchw", filters, quads).flatten(1, 2)


def unhaar(x: Tensor, filters: Tensor) -> Tensor:
    """Undo `haar`: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    quads = torch.einsum("bq,nbchw->ncqhw", filters, x.unflatten(1, (4, -1)))  # (N, C, 4, H, W)
    return F.pixel_shuffle(quads.flatten(1, 2), 2)


def fold(x: Tensor) -> Tensor:
    """Turn the 16C channels of a cell into 4x4 tokens: (N, 16C, H, W) -> (N, 16*H*W, C).

    Token (p, q) takes channels 4p + q, 4p + q + 16, 4p + q + 32 and so on. So every token holds a
    sixteenth of each band, not one band.
    """
    return x.unflatten(1, (-1, 4, 4)).permute(0, 4, 2, 5, 3, 1).flatten(1, 4)


def unfold(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `fold`: (N, T, C) -> (N, 16C, G/4, G/4)."""
    height, width = grid
    return x.unflatten(1, (height // 4, 4, width // 4, 4)).permute(0, 5, 2, 4, 1, 3).flatten(1, 3)


def windows(x: Tensor, grid: tuple[int, int], by_column: bool) -> Tensor:
    """Put the tokens of 4x4 windows one window after the other: (N, T, C) -> same.

    By column, both the windows and the tokens of a window are in column-major order.
    """
    x = x.unflatten(1, (4, grid[0] // 4, 4, grid[1] // 4))
    if by_column:
        return x.permute(0, 3, 1, 4, 2, 5).flatten(1, 4)
    return x.transpose(2, 3).flatten(1, 4)


def unwindows(x: Tensor, grid: tuple[int, int], by_column: bool) -> Tensor:
    """Undo `windows`."""
    if by_column:
        x = x.unflatten(1, (4, 4, grid[1] // 4, grid[0] // 4))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 4)
    return x.unflatten(1, (4, 4, grid[0] // 4, grid[1] // 4)).transpose(2, 3).flatten(1, 4)


class CrossFusion(nn.Module):
    """Attend from each branch to the other: two (N, T, E) -> (N, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv1 = Linear(dim // 2, 3 * (dim // 2))
        self.qkv2 = Linear(dim // 2, 3 * (dim // 2))
        self.proj = Linear(dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, k1, v1 = self._split(self.qkv1(x1))  # (N, h, T, e)
        q2, k2, v2 = self._split(self.qkv2(x2))
        from2 = attention(q1, k2, v2).transpose(1, 2).flatten(2)  # (N, T, E)
        from1 = attention(q2, k1, v1).transpose(1, 2).flatten(2)  # (N, T, E)
        return self.proj(torch.cat([from2, from1], dim=-1))  # (N, T, D)

    def _split(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (N, h, T, e)


class GatedMlp(nn.Module):
    """Project to gates and values; multiply the values by the GELU of the gates."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 8 * dim)
        self.w3 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # (N, T, 4D)
        return self.w3(F.gelu(gate, approximate="tanh") * value)  # (N, T, D)


class DiMSUMBlock(nn.Module):
    """Map an increment and the stream, h and r, to the next increment and r + h.

    The next increment is norm(r + h) after both branches, their fusion and the MLP. `kept`
    (N, 1, 1) weighs h.
    """

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
        r = add_increment(r, h, kept)  # (N, T, D)
        u = self.norm(r)
        x1, x2 = u.chunk(2, dim=-1)  # (N, T, E)
        h = u + self.proj(self.spatial_mamba(x1, c), self.freq_mamba(x2, c))  # (N, T, D)

        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)  # (N, 1, D)
        return gated(h, gate, self.mlp(modulate(self.norm_2(h), shift, scale))), r


class SharedBlock(nn.Module):
    """A DiT block with a gated MLP; the network has one, which it runs several times."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = GatedMlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)


class DiMSUM(nn.Module):
    """A stack of DiMSUM blocks over patches, with a shared attention block after every few."""

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
                "DiMSUM needs input_size divisible by 4 patches, dim by 4 and by heads and half of "
                f"it by fusion_heads, got input_size {input_size}, patch {patch}, dim {dim}, "
                f"heads {heads}, fusion_heads {fusion_heads}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)
        self.attention_every = attention_every

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
        """Start the MLPs' modulation and the head at zero; branches and shared block start open."""
        mamba_init(self, len(self.blocks))
        xavier_flat_(self.x_embedder.proj)
        self.t_embedder.init_weights()
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        return weights | {"pos_embed": resize_positions(weights["pos_embed"], self.grid[0])}

    def drop_rates(self, largest: float) -> list[float]:
        """Return the probability with which each of the K increments is dropped.

        As in the authors' code, it rises with depth to just below the largest.
        """
        depth = len(self.blocks)
        return [largest * i / (depth - 1) for i in range(depth - 1)]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Tensor | None = None) -> Tensor:
        """Predict; `kept` (N, K) multiplies the increments to the stream, by default by 1."""
        check_grid(x, self.input_size, self.patch, "DiMSUM")
        h = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)

        # The first block starts the stream, so its input has no weight.
        r = None
        for i, block in enumerate(self.blocks):
            weight = None
            if kept is not None and i > 0:
                weight = kept[:, i - 1, None, None]  # (N, 1, 1)
            h, r = block(h, r, c, weight)  # 2 x (N, T, D)
            if (i + 1) % self.attention_every == 0:
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
    exceptions=Exceptions(
        sizes=(24,),  # a grid of 12 has windows of 3, which no power of two would show
        frozen={"*.mixer.cond_proj.*": "the authors' kernel never reads this projection"},
    ),
)
