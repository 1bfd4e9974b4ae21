"""ADM's classifiers of noisy images: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, section 4.1.

The downsampling half of ADM's U-Net at its last grid, and attention pooling: a mean token, asked for the class, sees all
pixels. Their gradient guides a base model. `(x, t)` -> logits (N, num_classes): no backbone, so it is registered apart.
Legend: N batch, C width of a layer, E = 4D width of the embedding, h heads, T = HW pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.adm import AttentionBlock, ResBlock, attend, halve, run_block
from backbones.layers import Linear, check_grid, timestep_sinusoid, zero_
from backbones.registry import register


class AttentionPool(nn.Module):
    """The mean and all pixels attend to one another, in the new order; what the mean takes away is the answer."""

    def __init__(self, side: int, dim: int, head_dim: int, dim_out: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(dim, side**2 + 1) / dim**0.5)
        self.qkv_proj = nn.Conv1d(dim, 3 * dim, 1)
        self.c_proj = nn.Conv1d(dim, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)  # (N, C, T)
        x = (
            torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding
        )  # (N, C, 1 + T)
        return self.c_proj(attend(self.qkv_proj(x), self.heads, "new"))[:, :, 0]  # (N, K)


class ADMClassifier(nn.Module):
    """`attention_at` are the grids (pixels a side) whose levels attend, in the legacy order; the input size is fixed by the pooling."""

    def __init__(
        self,
        *,
        input_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        dim: int = 128,
        multipliers: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_at: tuple[int, ...] = (32, 16, 8),
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        widths, last = [int(dim * m) for m in multipliers], len(multipliers) - 1
        attending = [
            width
            for level, width in enumerate(widths)
            if level == last or input_size >> level in attention_at
        ]
        if any(dim * m % 32 for m in multipliers) or any(width % head_dim for width in attending):
            raise ValueError(
                f"ADM's classifier needs widths divisible by 32, and where it attends by head_dim {head_dim}, got {widths}"
            )
        if input_size % 2**last:
            raise ValueError(
                f"ADM's classifier halves its input {last} times: input_size must be divisible by {2**last}, got {input_size}"
            )
        self.input_size, self.in_channels, self.num_classes, self.dim, dim_emb = (
            input_size,
            in_channels,
            num_classes,
            dim,
            4 * dim,
        )

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, width // head_dim, "legacy")

        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))
        width = widths[0]
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])]
        )
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
                width = widths[level]
                self.input_blocks.append(
                    block.append(attention(width)) if input_size >> level in attention_at else block
                )
            if level < last:
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, dim_emb, halve)]))
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), attention(width), ResBlock(width, width, dim_emb)]
        )
        self.out = nn.Sequential(
            nn.GroupNorm(32, width),
            nn.SiLU(),
            AttentionPool(input_size >> last, width, head_dim, num_classes),
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """torch's defaults, but every residual branch starts at zero; the pooling does not."""
        zero_(*(block.out_layers[3] for block in self.modules() if isinstance(block, ResBlock)))
        zero_(*(block.proj_out for block in self.modules() if isinstance(block, AttentionBlock)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        check_grid(x, self.input_size, 1, "ADM's classifier")
        c = self.time_embed(
            timestep_sinusoid(t, self.dim).to(self.time_embed[0].weight.dtype)
        )  # (N, E)
        for block in self.input_blocks:
            x = run_block(block, x, c)  # (N, C, H / 2^level, W / 2^level)
        return self.out(run_block(self.middle_block, x, c))  # (N, K)


register(
    ADMClassifier,
    dict(
        adm_classifier_64=dict(input_size=64, num_res_blocks=4),
        adm_classifier_128=dict(input_size=128, multipliers=(1, 1, 2, 3, 4)),
        adm_classifier_256=dict(input_size=256, multipliers=(1, 1, 2, 2, 4, 4)),
        adm_classifier_512=dict(input_size=512, multipliers=(0.5, 1, 1, 2, 2, 4, 4)),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(0.5, 1, 2),
        num_res_blocks=1,
        attention_at=(8, 4),
        head_dim=16,
    ),
    classifier=True,
)
