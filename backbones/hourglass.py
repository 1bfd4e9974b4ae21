"""DiCo's U-shape with a swappable token mixer.

Source: Tables 3 and 4 of the DiCo paper (arXiv:2505.11196). A reconstruction: the code of its
ablations was not published. With the conv mixer it is DiCo itself; a test compares the two.

Legend: N batch, C width of a stage (D, 2D, 4D, 2D, 2D), (H, W) input grid.
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
    run_stage,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.mixers import build_mixer
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register

Five = tuple[int, int, int, int, int]


class Hourglass(nn.Module):
    """A U-shape of blocks at three resolutions.

    `heads` gives the mixer's heads per stage. `position` adds DiT's fixed position embedding to the
    stem's output.
    """

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
                "the U-shape halves its input twice: input_size must be divisible by 4, "
                f"got {input_size}"
            )
        check_stages(dim, 4 if position else 2, depths=depths, heads=heads)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        d1, d2, d3 = dim, 2 * dim, 4 * dim

        def stage(number: int, width: int, shrink: int) -> nn.ModuleList:
            """Build a stage whose grid is the input's divided by `shrink`."""
            size = (input_size // shrink, input_size // shrink)
            options = dict(mixer_options or {})
            if heads:
                options["heads"] = heads[number]
            mixers = [build_mixer(mixer, width, size, i, **options) for i in range(depths[number])]
            return nn.ModuleList(Block(width, m, mlp_ratio, gelu="none") for m in mixers)

        self.stem = ConvStem(in_channels, d1)
        self.position = None
        if position:
            grid = (input_size, input_size)
            table = sincos_position(d1, grid).transpose(1, 2).unflatten(2, grid)  # (1, D, H, W)
            self.position = nn.Parameter(table, requires_grad=False)
        self.t_embedders = nn.ModuleList(TimestepEmbedder(d) for d in (d1, d2, d3))
        self.y_embedders = nn.ModuleList(LabelEmbedder(num_classes, d) for d in (d1, d2, d3))

        self.encoder_1 = stage(0, d1, 1)
        self.down_1 = Downsample(d1)
        self.encoder_2 = stage(1, d2, 2)
        self.down_2 = Downsample(d2)
        self.middle = stage(2, d3, 4)
        self.up_2 = Upsample(d3)
        self.reduce_2 = Pointwise(2 * d2, d2)
        self.decoder_2 = stage(3, d2, 2)
        self.up_1 = Upsample(d2)
        self.reduce_1 = Pointwise(2 * d1, d2)
        self.decoder_1 = stage(4, d2, 1)
        self.final = ConvFinal(d2, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.stem.proj)
        zero_modulation(block for block in self.modules() if isinstance(block, Block))
        zero_(self.final.adaLN_modulation, self.final.out_proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None if self.position is None else self.input_size, 4, "U-shape")
        conditions = []
        for embed_t, embed_y in zip(self.t_embedders, self.y_embedders, strict=True):
            conditions.append(embed_t(t) + embed_y(y))
        c1, c2, c3 = conditions  # (N, D), (N, 2D), (N, 4D)
        x = self.stem(x)  # (N, D, H, W)
        if self.position is not None:
            x = x + self.position

        # Encoder and middle.
        x1 = run_stage(self.encoder_1, x, c1)  # (N, D, H, W)
        x2 = run_stage(self.encoder_2, self.down_1(x1), c2)  # (N, 2D, H/2, W/2)
        x3 = run_stage(self.middle, self.down_2(x2), c3)  # (N, 4D, H/4, W/4)

        # Decoder: join the encoder's output and reduce the channels.
        u2 = torch.cat([self.up_2(x3), x2], dim=1)  # (N, 4D, H/2, W/2)
        u2 = run_stage(self.decoder_2, self.reduce_2(u2), c2)  # (N, 2D, H/2, W/2)
        u1 = torch.cat([self.up_1(u2), x1], dim=1)  # (N, 2D, H, W)
        u1 = run_stage(self.decoder_1, self.reduce_1(u1), c2)  # (N, 2D, H, W)
        return self.final(u1, c2)  # (N, C_out, H, W)


register(
    Hourglass,
    dict(hourglass={}),
    tiny=dict(dim=12, depths=(2, 1, 1, 1, 1)),
    guided_channels=3,
    exceptions=Exceptions(
        frozen={"position": "positions are a fixed sine-cosine table"},
        uncounted="the published counts are those of the rows of the ablations, not of a size",
    ),
)
