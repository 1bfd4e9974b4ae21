"""ADM's classifiers of noisy images: Dhariwal & Nichol, NeurIPS 2021, section 4.1.

Source: arXiv:2105.05233 and github.com/openai/guided-diffusion at 22e0df8.

The downsampling half of ADM's U-Net and attention pooling at its last grid: a mean token attends to
all pixels and its output is read as logits. The gradient of a class's logit guides a base model.
The classifier maps (x, t) to logits (N, num_classes), so it is registered apart from the backbones.

Legend: N batch, C width of a layer, (H, W) grid, E = 4D width of the embedding, h heads,
T = HW pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.adm import AttentionBlock, ResBlock, attend, halve
from backbones.layers import Linear, check_grid, embed_time, run_layers, zero_
from backbones.registry import register


class AttentionPool(nn.Module):
    """Attend among the mean and all pixels, in the new order, and read the mean's output."""

    def __init__(self, side: int, dim: int, head_dim: int, dim_out: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(dim, side**2 + 1) / dim**0.5)
        self.qkv_proj = nn.Conv1d(dim, 3 * dim, 1)
        self.c_proj = nn.Conv1d(dim, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)  # (N, C, T)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # (N, C, 1 + T)
        x = x + self.positional_embedding
        h = attend(self.qkv_proj(x), self.heads, "new")  # (N, C, 1 + T)
        return self.c_proj(h)[:, :, 0]  # (N, K)


class ADMClassifier(nn.Module):
    """The classifier of ADM; the pooling fixes its input size.

    `attention_resolutions` lists heights in pixels, as in ADM: a level attends if its grid has such
    a height. Its attention is in the legacy order.
    """

    def __init__(
        self,
        *,
        input_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        dim: int = 128,
        multipliers: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        widths = [int(dim * m) for m in multipliers]
        last = len(multipliers) - 1
        attends = [input_size >> level in attention_resolutions for level in range(last + 1)]
        _check(input_size, dim, multipliers, attends, head_dim)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dim = dim
        dim_emb = 4 * dim

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, width // head_dim, "legacy")

        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))

        # Residual blocks of each level, then a halving, as in ADM's encoder.
        width = widths[0]
        stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
                width = widths[level]
                if attends[level]:
                    block.append(attention(width))
                self.input_blocks.append(block)
            if level < last:
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, dim_emb, halve)]))

        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), attention(width), ResBlock(width, width, dim_emb)]
        )
        pool = AttentionPool(input_size >> last, width, head_dim, num_classes)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), pool)
        self._init_weights()

    def _init_weights(self) -> None:
        """Keep torch's defaults, but start every residual branch at zero; the pooling is open."""
        for block in self.modules():
            if isinstance(block, ResBlock):
                zero_(block.out_layers[3])
            elif isinstance(block, AttentionBlock):
                zero_(block.proj_out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        check_grid(x, self.input_size, 1, "ADM's classifier")
        c = embed_time(self.time_embed, t, self.dim)  # (N, E)
        conditions: dict[type[nn.Module], Tensor] = {ResBlock: c}
        for block in self.input_blocks:
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
        return self.out(run_layers(self.middle_block, x, conditions))  # (N, K)


def _check(
    input_size: int,
    dim: int,
    multipliers: tuple[float, ...],
    attends: list[bool],
    head_dim: int,
) -> None:
    """Raise ValueError for widths that do not split and for inputs that cannot be halved."""
    widths = [int(dim * m) for m in multipliers]
    last = len(widths) - 1
    attending = [width for width, here in zip(widths, attends, strict=True) if here]
    attending.append(widths[last])  # the middle block and the pooling

    if any(dim * m % 32 for m in multipliers) or any(width % head_dim for width in attending):
        raise ValueError(
            "ADM's classifier needs widths divisible by 32, and where it attends by head_dim "
            f"{head_dim}, got {widths}"
        )

    if input_size % 2**last:
        raise ValueError(
            f"ADM's classifier halves its input {last} times: input_size must be divisible by "
            f"{2**last}, got {input_size}"
        )


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
        attention_resolutions=(8, 4),
        head_dim=16,
    ),
    aliases={"attention_at": "attention_resolutions"},
    kind="classifier",
)
