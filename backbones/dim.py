"""DiM: Teng et al., "DiM: Diffusion Mamba for Efficient High-Resolution Image Synthesis", 2024.

Source: arXiv:2405.14224 and github.com/tyshiwo1/DiM-DiffusionMamba.

A scan runs through the leading tokens first, then through the grid in an order that changes from
block to block. Padding tokens mark the ends of the grid's lines.

Legend: N batch, C channels, p patch, (H, W) grid of patches, (G, G') = (H + 3, W + 3) the grid with
its frame of padding tokens, T = 2 + 3 + G*G' tokens (time, label, three separators, framed grid),
D width.
"""

from __future__ import annotations

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
from backbones.positions import resize_positions
from backbones.registry import Exceptions, register

_PAD = 3  # padding tokens: as many as the convolution has taps
_LEADING = 2 + _PAD
_CYCLE = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)


def scan_order(index: int, depth: int) -> tuple[bool, bool]:
    """Return the order in which a block scans the grid.

    The four orders take turns. The second half of the network takes them in reverse.
    """
    return _CYCLE[min(index, depth - 1 - index) % 4]


class AdaptiveSingle(nn.Module):
    """Derive one modulation for all blocks: t and y (N,) -> shift, scale and gate (N, 3, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        layers = OrderedDict(linear_1=Linear(256, dim), act=nn.SiLU(), linear_2=Linear(dim, dim))
        time = nn.Sequential(layers)
        label = LabelEmbedder(num_classes, dim)
        self.emb = nn.ModuleDict(dict(timestep_embedder=time, class_embedder=label))
        self.linear = Linear(dim, 3 * dim)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(t, 256).to(self.linear.weight.dtype)
        c = self.emb["timestep_embedder"](sinusoid) + self.emb["class_embedder"](y)  # (N, D)
        return self.linear(F.silu(c)).unflatten(-1, (3, -1))  # (N, 3, D)


class Frame(nn.Module):
    """Frame the grid on the right and below with three learned tokens, and smooth it.

    On the right, tokens 0, 1 and 2 end every line. Below stands a line of each (the 256 model).
    With `raster` they take turns from place to place instead (the fine-tuned 512 model).
    """

    below: Tensor  # which of the three tokens stands at each place below the grid: (3, G')

    def __init__(self, dim: int, grid: tuple[int, int], raster: bool) -> None:
        super().__init__()
        self.grid = grid
        self.framed = (grid[0] + _PAD, grid[1] + _PAD)
        self.pad_token_dec_split = nn.Parameter(0.02 * torch.randn(1, _PAD, dim))
        self.pad_token = nn.Parameter(0.02 * torch.randn(1, dim, _PAD))
        self.first_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.last_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        place = torch.arange(_PAD * self.framed[1]).view(_PAD, -1)
        below = place % _PAD if raster else place // self.framed[1]
        self.register_buffer("below", below, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth and frame the grid of time, label and patches: (N, 2 + H*W, D) -> (N, T, D)."""
        n = len(x)
        pad = self.pad_token[0].T  # (3, D)
        patches = self.first_smoother(_image(x[:, 2:], self.grid))  # (N, D, H, W)
        patches = patches.permute(0, 2, 3, 1)  # (N, H, W, D)

        right = pad.expand(n, self.grid[0], -1, -1)  # (N, H, 3, D)
        below = pad[self.below].expand(n, -1, -1, -1)  # (N, 3, G', D)
        framed = torch.cat([torch.cat([patches, right], dim=2), below], dim=1)  # (N, G, G', D)

        separators = self.pad_token_dec_split.expand(n, -1, -1)  # (N, 3, D)
        return torch.cat([x[:, :2], separators, framed.flatten(1, 2)], dim=1)  # (N, T, D)

    def take_off(self, x: Tensor) -> Tensor:
        """Take the frame and the leading tokens off and smooth: (N, T, D) -> (N, H*W, D)."""
        patches = _image(x[:, _LEADING:], self.framed)[:, :, :-_PAD, :-_PAD]  # (N, D, H, W)
        return self.last_smoother(patches).flatten(2).transpose(1, 2)  # (N, H*W, D)

    def turn(self, x: Tensor, last: tuple[bool, bool], now: tuple[bool, bool]) -> Tensor:
        """Put the grid from one order into another; the leading tokens stay in front."""
        if last == now:
            return x
        grid = reorder(restore(x[:, _LEADING:], self.framed, last), self.framed, now)
        return torch.cat([x[:, :_LEADING], grid], dim=1)


def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


class DiMBlock(nn.Module):
    """A Mamba mixer, modulated by the shared condition plus the block's own table."""

    called_apart = ("skip_linear",)

    def __init__(self, dim: int, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.Sequential(OrderedDict(norm=nn.RMSNorm(dim, eps=1e-5)))
        self.attn1 = Mamba(dim, kernel=_PAD)
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
        self.skip_linear = nn.ModuleList([Linear(dim, dim), Linear(dim, dim)]) if skip else None

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join a long skip: two (N, T, D) -> (N, T, D)."""
        assert self.skip_linear is not None
        return float32_or_wider(self.skip_linear[0](x) + self.skip_linear[1](skip))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = (self.scale_shift_table + modulation).chunk(3, dim=1)  # (N, 1, D)
        return x + (1 + gate) * self.attn1(modulate(self.norm1(x), shift, scale))  # (N, T, D)


class DiM(nn.Module):
    """A stack of Mamba blocks with long skips over a framed grid of patches."""

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
                "DiM needs input_size divisible by patch, an odd depth and an even dim, "
                f"got input_size {input_size}, patch {patch}, depth {depth}, dim {dim}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)
        num_patches = self.grid[0] * self.grid[1]

        self.additional_embed = nn.Parameter(torch.zeros(1, 2 + num_patches, dim))
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
        for layer in self.adaln_single.emb["timestep_embedder"].modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        embed = resize_positions(weights["additional_embed"], self.grid[0], leading=2)
        return weights | {"additional_embed": embed}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "DiM")
        modulation = self.adaln_single(t, y)  # (N, 3, D)
        positions = self.additional_embed
        time = timestep_sinusoid(t, positions.shape[-1]).to(positions.dtype)  # (N, D)
        label = self.label_emb(y)  # (N, D)
        x = torch.cat([time[:, None], label[:, None], self.pos_embed(x)], dim=1)  # (N, 2 + H*W, D)
        x = float32_or_wider(self.a4m_adapter(x + positions))  # (N, T, D)
        x = self._run_blocks(x, modulation)

        x = self.norm_out(float32_or_wider(self.a4m_adapter.take_off(x)))  # (N, H*W, D)
        shift, scale = self.proj_out_1(F.silu(time + label))[:, None].chunk(2, dim=-1)  # (N, 1, D)
        x = self.proj_out_2(modulate(x, shift, scale))  # (N, H*W, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H*p, W*p)

    def _run_blocks(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Run the blocks; skips join blocks i and depth - i, which scan the grid in one order.

        The first block is outside this U and has no skip.
        """
        depth = len(self.transformer_blocks)
        order = ROWS
        skips: list[Tensor] = []

        # The first half keeps its outputs, and the second half merges them in reverse order.
        for i, block in enumerate(self.transformer_blocks):
            assert isinstance(block, DiMBlock)
            if i > depth // 2:
                x = block.merge(x, skips.pop())
            x = self.a4m_adapter.turn(x, order, scan_order(i, depth))
            order = scan_order(i, depth)
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
    exceptions=Exceptions(open_head="the authors keep torch's default weights in the head"),
)
