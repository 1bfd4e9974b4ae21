"""U-ViT for text: Bao et al., "All are Worth Words", CVPR 2023, section 4.4 (MS-COCO).

Source: arXiv:2209.12152 and github.com/baofff/U-ViT at ce55170.

The blocks are those of the class-conditional network. The sequence is the time, the text and the
patches, in this order, and every one of its places has a learned position. So the order of the
tokens of text matters.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 patches, L tokens of text, K their
width, S = 1 + L + T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.captions import Captions, Text, TextNetwork, Work
from backbones.layers import (
    Conv3x3,
    Linear,
    PatchEmbed,
    check_grid,
    timestep_sinusoid,
    unpatchify,
    zero_bias_,
)
from backbones.positions import resize_positions
from backbones.registry import Exceptions, register
from backbones.uvit import UViTBlock


class TextUViT(TextNetwork):
    """A stack of transformer blocks with long skips over time, text and patches.

    `depth` counts the blocks besides the middle one.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch: int = 2,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        context_tokens: int = 77,
        context_dim: int = 768,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % heads or dim % 2 or depth % 2:
            raise ValueError(
                "U-ViT needs input_size divisible by patch, dim by heads, an even dim and depth, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}, "
                f"depth {depth}"
            )
        self.input_size = input_size
        self.in_channels = self.out_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.grid = (input_size // patch, input_size // patch)
        self.leading = 1 + context_tokens
        num_patches = self.grid[0] * self.grid[1]

        def arm(skip: bool) -> nn.ModuleList:
            return nn.ModuleList(UViTBlock(dim, heads, mlp_ratio, skip) for _ in range(depth // 2))

        self.captions = Captions(num_classes, context_tokens, context_dim, vocabulary=vocabulary)
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.context_embed = Linear(context_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.leading + num_patches, dim))
        self.in_blocks = arm(skip=False)
        self.mid_block = UViTBlock(dim, heads, mlp_ratio)
        self.out_blocks = arm(skip=True)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.decoder_pred = Linear(dim, patch * patch * in_channels)
        self.final_layer = Conv3x3(in_channels, in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start nothing but biases at zero; convolutions keep torch's defaults."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                zero_bias_(layer)
        self.captions.init_weights()

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        positions = resize_positions(weights["pos_embed"], self.grid[0], self.leading)
        return weights | {"pos_embed": positions}

    def text_work(self, text: Text) -> Work:
        return (self.context_embed(text.context),)  # (N, L, D)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text) -> Tensor:
        check_grid(x, self.input_size, self.patch, "U-ViT")
        (words,) = self.read(y)  # (N, L, D)
        patches = self.patch_embed(x)  # (N, T, D)
        time = timestep_sinusoid(t, patches.shape[-1]).to(patches.dtype)  # (N, D)
        x = torch.cat([time[:, None], words, patches], dim=1)  # (N, S, D)
        x = x + self.pos_embed

        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)  # (N, S, D)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())  # (N, S, D)

        x = self.decoder_pred(self.norm(x))[:, self.leading :]  # (N, T, p*p*C)
        return self.final_layer(unpatchify(x, self.grid, self.patch))  # (N, C, H, W)


register(
    TextUViT,
    dict(uvit_s_2_t2i=dict(depth=12), uvit_s_2_deep_t2i=dict(depth=16)),
    tiny=dict(dim=24, depth=4, heads=3, context_tokens=5, context_dim=10),
    exceptions=Exceptions(open_head="the authors draw every weight from N(0, 0.02)"),
)
