"""DiC: Tian et al., "DiC: Rethinking Conv3x3 Designs in Diffusion Models", CVPR 2025.

Source: github.com/YuchuanTian/DiC at bfa541b.

Legend: N batch, C width of a stage (D, 2D, 4D, 2D, D), (H, W) grid of a stage, C_in width of a
block's input (2C if a skip joins).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (
    Conv3x3,
    ConvFinal,
    ConvStem,
    Downsample,
    LabelEmbedder,
    Linear,
    Pointwise,
    TimestepEmbedder,
    Upsample,
    check_grid,
    modulate,
    xavier_flat_,
    xavier_init,
    zero_,
)
from backbones.registry import register

SKIP_EVERY = 3  # blocks per long skip


class DiCBlock(nn.Module):
    """Two 3x3 convolutions; the condition modulates between them and gates their output."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm0 = _group_norm(in_dim)
        self.conv0 = Conv3x3(in_dim, dim)
        self.affine = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))
        self.norm1 = _group_norm(dim)
        self.conv1 = Conv3x3(dim, dim)
        self.skip = Pointwise(in_dim, dim) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, scale, shift = self.affine(c)[..., None, None].chunk(3, dim=1)  # (N, C, 1, 1)
        h = self.conv0(F.gelu(self.norm0(x)))  # (N, C_in, H, W) -> (N, C, H, W)
        h = self.conv1(F.gelu(modulate(self.norm1(h), shift, scale)))  # (N, C, H, W)
        return gate * h + self.skip(x)  # (N, C, H, W)


def _group_norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, dim // 4), dim, eps=1e-5)


class DiC(nn.Module):
    """A U-shape of DiC blocks at three resolutions with a long skip from every third block."""

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 96,
        depths: tuple[int, int, int, int, int] = (6, 6, 5, 6, 6),
    ) -> None:
        super().__init__()
        _check(input_size, dim, depths)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        d1, d2, d3 = dim, 2 * dim, 4 * dim
        widths = (d1, d2, d3)

        self.x_embedder = ConvStem(in_channels, d1)
        self.t_embedder_ls = nn.ModuleList(TimestepEmbedder(d) for d in widths)
        self.y_embedder_ls = nn.ModuleList(LabelEmbedder(num_classes, d) for d in widths)
        self.enc_blocks = nn.ModuleList([_stage(d1, depths[0]), _stage(d2, depths[1])])
        self.lat_blocks = nn.ModuleList([_stage(d3, depths[2])])
        self.dec_blocks = nn.ModuleList(
            [_stage(d2, depths[3], skips=True), _stage(d1, depths[4], skips=True)]
        )
        self.downs = nn.ModuleList([Downsample(d1), Downsample(d2)])
        self.ups = nn.ModuleList([Upsample(d3), Upsample(d2)])
        self.output = Conv3x3(d1, d1)
        self.final_layer = ConvFinal(d1, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start only the head at zero.

        The authors' loop means to zero every block's modulation. It looks for a name that their
        blocks do not have and passes over the error, so `affine` keeps its Xavier weights and gates
        start open. The same holds here.
        """
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.out_proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, 4, "DiC")
        conditions = []
        for embed_t, embed_y in zip(self.t_embedder_ls, self.y_embedder_ls, strict=True):
            conditions.append(embed_t(t) + embed_y(y))
        c1, c2, c3 = conditions  # (N, D), (N, 2D), (N, 4D)

        skips: list[Tensor] = []
        x = _encode(self.enc_blocks[0], self.x_embedder(x), c1, skips)  # (N, D, H, W)
        x = _encode(self.enc_blocks[1], self.downs[0](x), c2, skips)  # (N, 2D, H/2, W/2)
        x = self.downs[1](x)  # (N, 4D, H/4, W/4)
        for block in _blocks(self.lat_blocks[0]):
            x = block(x, c3)  # (N, 4D, H/4, W/4)
        x = _decode(self.dec_blocks[0], self.ups[0](x), c2, skips)  # (N, 2D, H/2, W/2)
        x = _decode(self.dec_blocks[1], self.ups[1](x), c1, skips)  # (N, D, H, W)
        return self.final_layer(self.output(x), c1)  # (N, C_out, H, W)


def _stage(dim: int, depth: int, skips: bool = False) -> nn.ModuleList:
    """Build blocks under the authors' names, which have a level `conv`."""
    stage = nn.ModuleList()
    for i in range(depth):
        joins = skips and i % SKIP_EVERY == 0
        block = DiCBlock(2 * dim if joins else dim, dim)
        stage.append(nn.ModuleDict({"conv": block}))
    return stage


def _blocks(stage: nn.Module) -> list[nn.Module]:
    return [level.get_submodule("conv") for level in stage.children()]


def _encode(stage: nn.Module, x: Tensor, c: Tensor, skips: list[Tensor]) -> Tensor:
    """Run a stage; keep the last block's output and that of every third block before it."""
    blocks = _blocks(stage)
    for i, block in enumerate(blocks):
        x = block(x, c)
        if (len(blocks) - 1 - i) % SKIP_EVERY == 0:
            skips.append(x)
    return x


def _decode(stage: nn.Module, x: Tensor, c: Tensor, skips: list[Tensor]) -> Tensor:
    """Run a stage; join the latest skip before the first block and every third block after it."""
    for i, block in enumerate(_blocks(stage)):
        if i % SKIP_EVERY == 0:
            x = torch.cat([x, skips.pop()], dim=1)
        x = block(x, c)
    return x


def _num_skips(depth: int) -> int:
    return -(-depth // SKIP_EVERY)  # rounded up


def _check(input_size: int, dim: int, depths: tuple[int, int, int, int, int]) -> None:
    """Raise ValueError for sizes that do not halve, split into groups or pair their skips."""
    if input_size % 4:
        raise ValueError(
            f"DiC halves its input twice: input_size must be divisible by 4, got {input_size}"
        )
    if dim % 4 or any(width % min(32, width // 4) for width in (dim, 2 * dim, 4 * dim)):
        raise ValueError(
            "DiC normalises in groups of 4 channels, from width 128 on in 32 groups: "
            f"dim, 2 dim and 4 dim must divide so, got dim {dim}"
        )
    if any(_num_skips(depths[i]) != _num_skips(depths[-1 - i]) for i in (0, 1)):
        raise ValueError(
            f"DiC takes a skip from every {SKIP_EVERY}rd block: encoder and decoder need equally "
            f"many, got depths {depths}"
        )


register(
    DiC,
    dict(
        dic_s=dict(dim=96, depths=(6, 6, 5, 6, 6)),
        dic_b=dict(dim=192, depths=(6, 6, 5, 6, 6)),
        dic_xl=dict(dim=384, depths=(7, 7, 8, 7, 7)),
        dic_h=dict(dim=384, depths=(14, 14, 10, 14, 14)),
    ),
    tiny=dict(dim=12, depths=(4, 2, 1, 3, 4)),
    guided_channels=3,
)
