"""U-ViT: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023.

Predicts the noise alone. Time is taken as it is: its checkpoints were trained with steps 1..1000, not 0..999.
Legend: N batch, T patches, S = T + 2 tokens (label, time, patches), D width, h heads, e = D / h, p patch, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear, Mlp, PatchEmbed, check_grid, timestep_sinusoid, unpatchify
from backbones.registry import register


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = (
            self.qkv(x).view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # 3 x (N, h, S, e)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(n, s, d))  # (N, S, D)


class UViTBlock(nn.Module):
    """A pre-norm transformer block; in the second half a long skip is concatenated and reduced first."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="none")
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # (N, S, 2D) -> (N, S, D)
        x = x + self.attn(self.norm1(x))  # (N, S, D)
        return x + self.mlp(self.norm2(x))  # (N, S, D)


class UViT(nn.Module):
    """`depth` counts the blocks besides the middle one; `conv_head` adds a 3x3 convolution after the patches."""

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
                f"U-ViT needs input_size divisible by patch, dim by heads, an even dim and depth, got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}, depth {depth}"
            )
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels
        self.grid = (input_size // patch, input_size // patch)

        def half(skip: bool) -> nn.ModuleList:
            return nn.ModuleList(UViTBlock(dim, heads, mlp_ratio, skip) for _ in range(depth // 2))

        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.label_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], dim))
        self.in_blocks = half(skip=False)
        self.mid_block = UViTBlock(dim, heads, mlp_ratio)
        self.out_blocks = half(skip=True)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.decoder_pred = Linear(dim, patch * patch * in_channels)
        self.final_layer = (
            nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv_head else nn.Identity()
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """Nothing starts at zero but biases; convolutions and the label table keep torch's defaults."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "U-ViT")
        x = self.patch_embed(x)  # (N, T, D)
        time = timestep_sinusoid(t, x.shape[-1]).to(x.dtype)  # (N, D)
        x = torch.cat([self.label_emb(y)[:, None], time[:, None], x], dim=1)  # (N, S, D)
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
)
