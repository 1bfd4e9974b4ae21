"""DiT's stack with a swappable token mixer and, if asked for, U-ViT's long skips: Table 3 of the DiCo paper.

Legend: N batch, D width, (h, w) grid of patches, p patch, T = h w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backbones.block import Block
from backbones.layers import (
    LabelEmbedder,
    PatchEmbed,
    PatchFinal,
    Pointwise,
    TimestepEmbedder,
    check_grid,
    sincos_position,
    unpatchify,
    xavier_flat_,
    xavier_init,
    zero_,
)
from backbones.mixers import build_mixer
from backbones.registry import register


class Isotropic(nn.Module):
    """With `skips`, the output of block i is concatenated to the input of block depth-1-i for i < (depth-1)//2, then reduced.

    The innermost pair of an even depth has none: its skip would be its direct predecessor.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        patch: int = 2,
        dim: int = 256,
        depth: int = 24,
        mlp_ratio: float = 6.0,
        mixer: str = "conv",
        mixer_options: dict[str, Any] | None = None,
        skips: bool = False,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        if input_size % patch or dim % 4:
            raise ValueError(
                f"the isotropic stack needs input_size divisible by patch and dim by 4, got {input_size}, {patch} and {dim}"
            )
        if gelu not in ("none", "tanh"):
            raise ValueError(f"gelu is 'none' (erf) or 'tanh', got {gelu!r}")
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid = (input_size // patch, input_size // patch)
        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.position = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        mixers = [
            build_mixer(mixer, dim, self.grid, index, **(mixer_options or {}))
            for index in range(depth)
        ]
        self.blocks = nn.ModuleList(Block(dim, m, mlp_ratio, gelu) for m in mixers)
        self.reduce = nn.ModuleList(
            Pointwise(2 * dim, dim) for _ in range((depth - 1) // 2 if skips else 0)
        )
        self.final = PatchFinal(dim, patch, self.out_channels)
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_(*(block.adaLN_modulation[1] for block in self.blocks))
        zero_(self.final.adaLN_modulation[1], self.final.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "isotropic stack")
        x = self.x_embedder(x) + self.position  # (N, T, D)
        x = x.transpose(1, 2).unflatten(2, self.grid)  # (N, D, h, w)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        kept: list[Tensor] = []
        first_decoder = len(self.blocks) - len(self.reduce)
        for i, block in enumerate(self.blocks):
            if i >= first_decoder:
                x = self.reduce[i - first_decoder](torch.cat([x, kept.pop()], dim=1))
            x = block(x, c)  # (N, D, h, w)
            if i < len(self.reduce):
                kept.append(x)
        x = self.final(x.flatten(2).transpose(1, 2), c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)


register(Isotropic, {"isotropic": {}}, tiny=dict(dim=12, depth=3, mlp_ratio=2.0), guided_channels=3)
