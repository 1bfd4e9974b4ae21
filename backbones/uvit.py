"""U-ViT: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023.

Source: arXiv:2209.12152 and github.com/baofff/U-ViT at ce55170.

The network predicts the noise alone. Time is embedded as it is: its checkpoints were trained with
steps 1 to 1000, not 0 to 999.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 patches, S = T + 2 tokens (label,
time, patches), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.layers import (
    Conv3x3,
    Linear,
    Mlp,
    PatchEmbed,
    SelfAttention,
    check_grid,
    timestep_sinusoid,
    unpatchify,
    zero_bias_,
)
from backbones.positions import resize_positions
from backbones.registry import Exceptions, register


class UViTBlock(nn.Module):
    """A pre-norm transformer block; with `skip`, a long skip is concatenated and reduced first."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = SelfAttention(dim, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="none")
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # (N, S, 2D) -> (N, S, D)
        x = x + self.attn(self.norm1(x))  # (N, S, D)
        return x + self.mlp(self.norm2(x))  # (N, S, D)


class UViT(nn.Module):
    """A stack of transformer blocks with long skips.

    `depth` counts the blocks besides the middle one. `conv_head` adds a 3x3 convolution after the
    patches.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch: int = 2,
        dim: int = 1024,
        depth: int = 20,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        conv_head: bool = True,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % heads or dim % 2 or depth % 2:
            raise ValueError(
                "U-ViT needs input_size divisible by patch, dim by heads, an even dim and depth, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}, "
                f"depth {depth}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = in_channels
        self.grid = (input_size // patch, input_size // patch)
        num_patches = self.grid[0] * self.grid[1]

        def arm(skip: bool) -> nn.ModuleList:
            return nn.ModuleList(UViTBlock(dim, heads, mlp_ratio, skip) for _ in range(depth // 2))

        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.label_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + num_patches, dim))
        self.in_blocks = arm(skip=False)
        self.mid_block = UViTBlock(dim, heads, mlp_ratio)
        self.out_blocks = arm(skip=True)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.decoder_pred = Linear(dim, patch * patch * in_channels)
        self.final_layer: nn.Module = nn.Identity()
        if conv_head:
            self.final_layer = Conv3x3(in_channels, in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start nothing but biases at zero; convolutions and labels keep torch's defaults."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                zero_bias_(layer)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        return weights | {"pos_embed": resize_positions(weights["pos_embed"], self.grid[0], 2)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "U-ViT")
        patches = self.patch_embed(x)  # (N, T, D)
        time = timestep_sinusoid(t, patches.shape[-1]).to(patches.dtype)  # (N, D)
        label = self.label_emb(y)  # (N, D)
        x = torch.cat([label[:, None], time[:, None], patches], dim=1)  # (N, S, D)
        x = x + self.pos_embed

        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)  # (N, S, D)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())  # (N, S, D)

        x = self.decoder_pred(self.norm(x))[:, 2:]  # (N, T, p*p*C)
        return self.final_layer(unpatchify(x, self.grid, self.patch))  # (N, C, H, W)


register(
    UViT,
    dict(
        uvit_l_2=dict(patch=2, input_size=32, dim=1024, depth=20, conv_head=True),
        uvit_h_2=dict(patch=2, input_size=32, dim=1152, depth=28, conv_head=False),
        uvit_l_4=dict(patch=4, input_size=64, dim=1024, depth=20, conv_head=True),
        uvit_h_4=dict(patch=4, input_size=64, dim=1152, depth=28, conv_head=False),
    ),
    tiny=dict(dim=24, depth=4, heads=3),
    exceptions=Exceptions(open_head="the authors draw every weight from N(0, 0.02)"),
)
