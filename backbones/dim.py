"""DiM: Teng et al., "DiM: Diffusion Mamba for Efficient High-Resolution Image Synthesis", 2024.

Legend: N batch, (H, W) grid of patches, (G, G') = (H + 3, W + 3) the grid framed by padding tokens, T = 2 + 3 + G*G' tokens
(time, label, three separators, grid), D width, p patch, C channels. A scan runs through the leading tokens first and
through the grid in an order that changes from block to block; padding tokens mark the ends of its lines.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    check_grid,
    modulate,
    timestep_sinusoid,
    unpatchify,
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

_PAD = 3  # padding tokens: as many as the convolution has taps
_LEADING = 2 + _PAD
_CYCLE = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)


def scan_order(index: int, depth: int) -> tuple[bool, bool]:
    """The order of the grid in a block: a cycle of four, run backwards through the second half of the network."""
    return _CYCLE[min(index, depth - 1 - index) % 4]


class AdaptiveSingle(nn.Module):
    """One modulation for all blocks: t and y (N,) -> shift, scale and gate (N, 3, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        time = nn.Sequential(
            OrderedDict(linear_1=Linear(256, dim), act=nn.SiLU(), linear_2=Linear(dim, dim))
        )
        self.emb = nn.ModuleDict(
            dict(timestep_embedder=time, class_embedder=LabelEmbedder(num_classes, dim))
        )
        self.linear = Linear(dim, 3 * dim)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(t, 256).to(self.linear.weight.dtype)
        c = self.emb["timestep_embedder"](sinusoid) + self.emb["class_embedder"](y)  # (N, D)
        return self.linear(F.silu(c)).unflatten(-1, (3, -1))  # (N, 3, D)


class Frame(nn.Module):
    """Smooths the grid and frames it on the right and below with learned tokens; takes the frame off and smooths again.

    On the right, token 0, 1, 2 end every line. Below there is a line of each (the 256 model), or, with `raster`,
    they take turns from token to token (the fine-tuned 512 model).
    """

    def __init__(self, dim: int, grid: tuple[int, int], raster: bool) -> None:
        super().__init__()
        self.grid, self.framed = grid, (grid[0] + _PAD, grid[1] + _PAD)
        self.pad_token_dec_split = nn.Parameter(0.02 * torch.randn(1, _PAD, dim))
        self.pad_token = nn.Parameter(0.02 * torch.randn(1, dim, _PAD))
        self.first_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.last_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        place = torch.arange(_PAD * self.framed[1]).view(_PAD, -1)
        self.register_buffer(
            "below", place % _PAD if raster else place // self.framed[1], persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """time, label and grid (N, 2 + H*W, D) -> (N, T, D)."""
        n, pad, height = len(x), self.pad_token[0].T, self.grid[0]
        patches = self.first_smoother(_image(x[:, 2:], self.grid)).permute(
            0, 2, 3, 1
        )  # (N, H, W, D)
        right, below = pad.expand(n, height, -1, -1), pad[self.below].expand(n, -1, -1, -1)
        patches = torch.cat([torch.cat([patches, right], dim=2), below], dim=1).flatten(
            1, 2
        )  # (N, G*G', D)
        return torch.cat(
            [x[:, :2], self.pad_token_dec_split.expand(n, -1, -1), patches], dim=1
        )  # (N, T, D)

    def take_off(self, x: Tensor) -> Tensor:
        """(N, T, D) -> the patches alone (N, H*W, D)."""
        patches = _image(x[:, _LEADING:], self.framed)[:, :, :-_PAD, :-_PAD]  # (N, D, H, W)
        return self.last_smoother(patches).flatten(2).transpose(1, 2)  # (N, H*W, D)

    def turn(self, x: Tensor, last: tuple[bool, bool], now: tuple[bool, bool]) -> Tensor:
        """The grid from one order into another; the leading tokens stay in front."""
        if last == now:
            return x
        grid = reorder(restore(x[:, _LEADING:], self.framed, last), self.framed, now)
        return torch.cat([x[:, :_LEADING], grid], dim=1)


def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


class DiMBlock(nn.Module):
    def __init__(self, dim: int, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.Sequential(OrderedDict(norm=nn.RMSNorm(dim, eps=1e-5)))
        self.attn1 = Mamba(dim, kernel=_PAD)
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
        self.skip_linear = nn.ModuleList([Linear(dim, dim), Linear(dim, dim)]) if skip else None

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        return float32_or_wider(self.skip_linear[0](x) + self.skip_linear[1](skip))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = (self.scale_shift_table + modulation).chunk(3, dim=1)  # (N, 1, D)
        return x + (1 + gate) * self.attn1(modulate(self.norm1(x), shift, scale))  # (N, T, D)


class DiM(nn.Module):
    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        patch: int = 2,
        dim: int = 1024,
        depth: int = 49,
        raster_padding: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch or depth % 2 == 0 or dim % 2:
            raise ValueError(
                f"DiM needs input_size divisible by patch, an odd depth and an even dim, got input_size {input_size}, patch {patch}, depth {depth}, dim {dim}"
            )
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid = (input_size // patch, input_size // patch)
        self.additional_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], dim))
        self.label_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = PatchEmbed(in_channels, dim, patch)  # the authors' name for their stem
        self.adaln_single = AdaptiveSingle(num_classes, dim)
        self.transformer_blocks = nn.ModuleList(
            DiMBlock(dim, skip=i > depth // 2) for i in range(depth)
        )
        self.a4m_adapter = Frame(dim, self.grid, raster_padding)
        self.norm_out = nn.Sequential(OrderedDict(norm=nn.RMSNorm(dim, eps=1e-5)))
        self.proj_out_1 = Linear(dim, 2 * dim)
        self.proj_out_2 = Linear(dim, patch * patch * self.out_channels)
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        mamba_init(self, depth)
        time = self.adaln_single.emb["timestep_embedder"]
        nn.init.normal_(time.linear_1.weight, std=0.02)
        nn.init.normal_(time.linear_2.weight, std=0.02)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this network for another size of image, for this one: position embeddings are interpolated."""
        embed = weights["additional_embed"]
        side = math.isqrt(embed.shape[1] - 2)
        grid = F.interpolate(
            _image(embed[:, 2:], (side, side)), self.grid, mode="bilinear", align_corners=False
        )
        return weights | {
            "additional_embed": torch.cat([embed[:, :2], grid.flatten(2).transpose(1, 2)], dim=1)
        }

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "DiM")
        modulation = self.adaln_single(t, y)  # (N, 3, D)
        time = timestep_sinusoid(t, self.additional_embed.shape[-1]).to(self.additional_embed.dtype)
        label = self.label_emb(y)  # (N, D)
        x = torch.cat([time[:, None], label[:, None], self.pos_embed(x)], dim=1)  # (N, 2 + H*W, D)
        x = float32_or_wider(self.a4m_adapter(x + self.additional_embed))  # (N, T, D)
        x = self._blocks(x, modulation)
        x = self.norm_out(float32_or_wider(self.a4m_adapter.take_off(x)))  # (N, H*W, D)
        shift, scale = self.proj_out_1(F.silu(time + label))[:, None].chunk(2, dim=-1)  # (N, 1, D)
        x = self.proj_out_2(modulate(x, shift, scale))  # (N, H*W, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H*p, W*p)

    def _blocks(self, x: Tensor, modulation: Tensor) -> Tensor:
        """A U without its first block: skips join block i and block depth - i, which read the grid in one order."""
        depth, order, skips = len(self.transformer_blocks), ROWS, []
        for i, block in enumerate(self.transformer_blocks):
            if i > depth // 2:
                x = block.merge(x, skips.pop())
            x, order = self.a4m_adapter.turn(x, order, scan_order(i, depth)), scan_order(i, depth)
            x = block(x, modulation)  # (N, T, D)
            if 0 < i <= depth // 2:
                skips.append(x)
        return x


register(
    DiM,
    dict(
        dim_l=dict(dim=1024, depth=49),
        dim_h=dict(dim=1536, depth=49),
    ),
    tiny=dict(dim=20, depth=7),
)
