"""DiT's stack with a swappable token mixer and, optionally, U-ViT's long skips.

Source: Table 3 of the DiCo paper (arXiv:2505.11196). A reconstruction: the code of its ablations
was not published.

Legend: N batch, C channels, (H, W) input, p patch, (h, w) grid of patches, T = h w tokens, D width.
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
    unpatchify,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.mixers import build_mixer
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register


class Isotropic(nn.Module):
    """A stack of blocks over patches.

    With `skips`, the output of block i joins the input of block depth-1-i for i < (depth-1)//2 and
    a 1x1 convolution reduces both. The innermost pair of an even depth has no skip: its skip would
    come from its direct predecessor. `gelu` is torch's `approximate`.
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
                "the isotropic stack needs input_size divisible by patch and dim by 4, "
                f"got {input_size}, {patch} and {dim}"
            )
        if gelu not in ("none", "tanh"):
            raise ValueError(f"gelu is 'none' (erf) or 'tanh', got {gelu!r}")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)
        num_skips = (depth - 1) // 2 if skips else 0

        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.position = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        options = mixer_options or {}
        mixers = [build_mixer(mixer, dim, self.grid, i, **options) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, m, mlp_ratio, gelu) for m in mixers)
        self.reduce = nn.ModuleList(Pointwise(2 * dim, dim) for _ in range(num_skips))
        self.final = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_modulation(self.blocks)
        zero_(self.final.adaLN_modulation, self.final.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "isotropic stack")
        x = self.x_embedder(x) + self.position  # (N, T, D)
        x = x.transpose(1, 2).unflatten(2, self.grid)  # (N, D, h, w)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)

        # The first blocks keep their outputs; the last ones take them, the latest first.
        skips: list[Tensor] = []
        first_decoder = len(self.blocks) - len(self.reduce)
        for i, block in enumerate(self.blocks):
            if i >= first_decoder:
                x = torch.cat([x, skips.pop()], dim=1)  # (N, 2D, h, w)
                x = self.reduce[i - first_decoder](x)  # (N, D, h, w)
            x = block(x, c)  # (N, D, h, w)
            if i < len(self.reduce):
                skips.append(x)

        x = self.final(x.flatten(2).transpose(1, 2), c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)


register(
    Isotropic,
    dict(isotropic={}),
    tiny=dict(dim=12, depth=3, mlp_ratio=2.0),
    guided_channels=3,
    exceptions=Exceptions(
        frozen={"position": "positions are a fixed sine-cosine table"},
        uncounted="the published counts are those of the rows of the ablations, not of a size",
    ),
)
