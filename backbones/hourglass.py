"""DiCo's U-shape with a swappable token mixer: Tables 3 and 4 of the DiCo paper.

With the conv mixer it is DiCo itself (a test holds the two together). Widths are D, 2D, 4D, 2D, 2D as there.
Legend: N batch, C width of a stage, (H, W) input grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backbones.block import Block
from backbones.layers import (
    ConvFinal,
    ConvStem,
    Downsample,
    LabelEmbedder,
    Pointwise,
    TimestepEmbedder,
    Upsample,
    check_grid,
    check_stages,
    sincos_position,
    xavier_flat_,
    xavier_init,
    zero_,
)
from backbones.mixers import build_mixer
from backbones.registry import register

Five = tuple[int, int, int, int, int]


class Hourglass(nn.Module):
    """`heads` gives the mixer's heads per stage; `position` adds DiT's fixed sin-cos embedding to the stem."""

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 128,
        depths: Five = (5, 4, 4, 4, 4),
        mlp_ratio: float = 2.0,
        mixer: str = "conv",
        mixer_options: dict[str, Any] | None = None,
        heads: Five | None = None,
        position: bool = False,
    ) -> None:
        super().__init__()
        if input_size % 4:
            raise ValueError(
                f"the U-shape halves its input twice: input_size must be divisible by 4, got {input_size}"
            )
        check_stages(dim, 4 if position else 2, depths=depths, heads=heads)
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        d1, d2, d3 = dim, 2 * dim, 4 * dim

        def stage(number: int, width: int, shrink: int) -> nn.ModuleList:
            size = (input_size // shrink, input_size // shrink)
            options = (mixer_options or {}) | (dict(heads=heads[number]) if heads else {})
            mixers = [
                build_mixer(mixer, width, size, index, **options) for index in range(depths[number])
            ]
            return nn.ModuleList(Block(width, m, mlp_ratio, gelu="none") for m in mixers)

        self.stem = ConvStem(in_channels, d1)
        self.position = None
        if position:
            grid = (input_size, input_size)
            self.position = nn.Parameter(
                sincos_position(d1, grid).transpose(1, 2).unflatten(2, grid), requires_grad=False
            )
        self.t_embedders = nn.ModuleList(TimestepEmbedder(d) for d in (d1, d2, d3))
        self.y_embedders = nn.ModuleList(LabelEmbedder(num_classes, d) for d in (d1, d2, d3))
        self.encoder_1, self.down_1 = stage(0, d1, 1), Downsample(d1)
        self.encoder_2, self.down_2 = stage(1, d2, 2), Downsample(d2)
        self.middle, self.up_2 = stage(2, d3, 4), Upsample(d3)
        self.reduce_2, self.decoder_2, self.up_1 = (
            Pointwise(2 * d2, d2),
            stage(3, d2, 2),
            Upsample(d2),
        )
        self.reduce_1, self.decoder_1 = Pointwise(2 * d1, d2), stage(4, d2, 1)
        self.final = ConvFinal(d2, self.out_channels)
        xavier_init(self)
        xavier_flat_(self.stem.proj)
        zero_(*(block.adaLN_modulation[1] for block in self.modules() if isinstance(block, Block)))
        zero_(self.final.adaLN_modulation[1], self.final.out_proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None if self.position is None else self.input_size, 4, "U-shape")
        c1, c2, c3 = (
            embed_t(t) + embed_y(y)
            for embed_t, embed_y in zip(self.t_embedders, self.y_embedders, strict=True)
        )
        x = self.stem(x)  # (N, D, H, W)
        if self.position is not None:
            x = x + self.position
        x1 = _run(self.encoder_1, x, c1)  # (N, D, H, W)
        x2 = _run(self.encoder_2, self.down_1(x1), c2)  # (N, 2D, H/2, W/2)
        x3 = _run(self.middle, self.down_2(x2), c3)  # (N, 4D, H/4, W/4)
        u2 = self.reduce_2(torch.cat([self.up_2(x3), x2], dim=1))  # (N, 2D, H/2, W/2)
        u2 = _run(self.decoder_2, u2, c2)
        u1 = self.reduce_1(torch.cat([self.up_1(u2), x1], dim=1))  # (N, 2D, H, W)
        return self.final(_run(self.decoder_1, u1, c2), c2)  # (N, C_out, H, W)


def _run(stage: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    for block in stage:
        x = block(x, c)
    return x


register(Hourglass, {"hourglass": {}}, tiny=dict(dim=12, depths=(2, 1, 1, 1, 1)), guided_channels=3)
