"""ADM: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, section 3.

Source: arXiv:2105.05233 and github.com/openai/guided-diffusion at 22e0df8.

Four class-conditional base models in pixel space and the two upsamplers of "ADM-U". An upsampler's
input has twice the channels of an image: the noisy image, then the low-resolution one, resized.
The label table has a row per class. The suite's null label, num_classes, needs `null_label=True`,
which no published model has.

Legend: N batch, C width of a layer, (H, W) grid, E = 4D width of the embedding, h heads, e = C / h,
T = HW pixels. A level is the number of times the input was halved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (
    Conv3x3,
    Linear,
    Pointwise,
    check_grid,
    embed_time,
    modulate,
    run_layers,
    zero_,
)
from backbones.registry import Exceptions, register

ORDERS = ("legacy", "new")
halve = partial(F.avg_pool2d, kernel_size=2)
double = partial(F.interpolate, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """Two 3x3 convolutions around adaptive group norm (section 3.1).

    `resample` changes the grid before the first convolution and in the skip connection.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        dim_emb: int,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        conv1 = Conv3x3(dim, dim_out)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, dim), nn.SiLU(), conv1)
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(dim_emb, 2 * dim_out))
        norm2 = nn.GroupNorm(32, dim_out)
        conv2 = Conv3x3(dim_out, dim_out)

        # The base model at 64 was trained with dropout 0.1. A backbone draws no random numbers,
        # so the rate is 0; the layer keeps the place of the next one in the names of the weights.
        self.out_layers = nn.Sequential(norm2, nn.SiLU(), nn.Dropout(0.0), conv2)
        self.skip_connection = nn.Identity() if dim_out == dim else Pointwise(dim, dim_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        norm1, act, conv1 = self.in_layers
        norm2, *rest = self.out_layers
        h = act(norm1(x))  # (N, C, H, W)
        if self.resample is not None:
            h = self.resample(h)  # (N, C, H', W')
            x = self.resample(x)  # (N, C, H', W')
        h = conv1(h)  # (N, C_out, H', W')

        scale, shift = self.emb_layers(c)[..., None, None].chunk(2, dim=1)  # (N, C_out, 1, 1)
        h = modulate(norm2(h), shift, scale)  # (N, C_out, H', W')
        for layer in rest:
            h = layer(h)  # (N, C_out, H', W')
        return self.skip_connection(x) + h  # (N, C_out, H', W')


def attend(qkv: Tensor, heads: int, order: str) -> Tensor:
    """Attend among all pixels: (N, 3C, T) -> (N, C, T).

    The channels of `qkv` are (h, 3, e) in the legacy order and (3, h, e) in the new one.
    """
    if order == "legacy":
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)  # 3 x (N, h, e, T)
    else:
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # 3 x (N, h, e, T)

    # Not kernels.attention: ADM scales q and k each by e^-1/4, to stay in range in half precision,
    # and its published cost counts both products. The kernel's reference scales q alone.
    scale = q.shape[2] ** -0.25
    weights = ((q * scale).transpose(2, 3) @ (k * scale)).softmax(dim=-1)  # (N, h, T, T)
    return (v @ weights.transpose(2, 3)).flatten(1, 2)  # (N, C, T)


class AttentionBlock(nn.Module):
    """Self-attention over pixels with a residual connection: (N, C, H, W) -> same."""

    def __init__(self, dim: int, heads: int, order: str) -> None:
        super().__init__()
        self.heads = heads
        self.order = order
        self.norm = nn.GroupNorm(32, dim)
        self.qkv = nn.Conv1d(dim, 3 * dim, 1)
        self.proj_out = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)  # (N, C, T)
        h = attend(self.qkv(self.norm(pixels)), self.heads, self.order)  # (N, C, T)
        return (pixels + self.proj_out(h)).view(x.shape)  # (N, C, H, W)


class ADM(nn.Module):
    """The U-Net of ADM.

    `attention_resolutions` lists heights in pixels: a level attends if its grid has such a height.
    Without `heads`, a layer has one head for every `head_dim` channels.
    """

    def __init__(
        self,
        *,
        input_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 256,
        multipliers: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        heads: int | None = None,
        head_dim: int = 64,
        order: str = "legacy",
        low_res: bool = False,
        null_label: bool = False,
    ) -> None:
        super().__init__()
        last = len(multipliers) - 1
        _check_widths(dim, multipliers, heads, head_dim)
        _check_input(input_size, last, in_channels, order, low_res)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        image_channels = in_channels // 2 if low_res else in_channels
        self.out_channels = 2 * image_channels if learn_sigma else image_channels
        self.dim = dim
        self.multiple = 2**last
        self.num_res_blocks = num_res_blocks
        widths = [int(dim * m) for m in multipliers]
        self.widths = widths
        self.level_heads = [heads or width // head_dim for width in widths]
        self.order = order
        # Of each level whether it attends.
        self.depths = tuple(
            int(input_size >> level in attention_resolutions) for level in range(last + 1)
        )
        dim_emb = 4 * dim

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, heads or width // head_dim, order)

        def level_block(width: int, level: int) -> nn.ModuleList:
            """Build a residual block to the level's width; add attention if it attends."""
            block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
            if self.depths[level]:
                block.append(attention(widths[level]))
            return block

        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))
        self.label_emb = nn.Embedding(num_classes + null_label, dim_emb)

        # The encoder keeps the width of every output: the decoder joins them last in, first out.
        width = widths[0]
        stem = Conv3x3(in_channels, width)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        skips = [width]
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                self.input_blocks.append(level_block(width, level))
                width = widths[level]
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, dim_emb, halve)]))
                skips.append(width)

        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), attention(width), ResBlock(width, width, dim_emb)]
        )

        # The decoder has one block more per level, which joins the output of the halving.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(num_res_blocks + 1):
                block = level_block(width + skips.pop(), level)
                width = widths[level]
                if level and index == num_res_blocks:
                    block.append(ResBlock(width, width, dim_emb, double))
                self.output_blocks.append(block)

        head = Conv3x3(width, self.out_channels)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), head)
        self._init_weights()

    def _init_weights(self) -> None:
        """Keep torch's defaults, but start every residual branch and the head at zero."""
        zero_(self.out[2])
        for block in self.modules():
            if isinstance(block, ResBlock):
                zero_(block.out_layers[3])
            elif isinstance(block, AttentionBlock):
                zero_(block.proj_out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, self.multiple, "ADM")
        c = embed_time(self.time_embed, t, self.dim) + self.label_emb(y)  # (N, E)
        conditions: dict[type[nn.Module], Tensor] = {ResBlock: c}

        skips = []
        for block in self.input_blocks:
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
            skips.append(x)
        x = run_layers(self.middle_block, x, conditions)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
        return self.out(x)  # (N, C_out, H, W)


def _check_widths(
    dim: int, multipliers: tuple[float, ...], heads: int | None, head_dim: int
) -> None:
    """Raise ValueError unless all widths split into 32 groups and into heads."""
    if any(dim * m % 32 or dim * m % (heads or head_dim) for m in multipliers):
        divisor = f"heads {heads}" if heads else f"head_dim {head_dim}"
        widths = [int(dim * m) for m in multipliers]
        raise ValueError(f"ADM needs widths divisible by 32 and by {divisor}, got {widths}")


def _check_input(
    input_size: int, halvings: int, in_channels: int, order: str, low_res: bool
) -> None:
    """Raise ValueError for an input that cannot be halved, an unknown order or odd channels."""
    if input_size % 2**halvings:
        raise ValueError(
            f"ADM halves its input {halvings} times: input_size must be divisible by "
            f"{2**halvings}, got {input_size}"
        )

    if order not in ORDERS:
        raise ValueError(f"unknown attention order {order!r}; known: {', '.join(ORDERS)}")

    if low_res and in_channels % 2:
        raise ValueError(
            "an upsampler takes an image and its low-resolution one: in_channels must be even, "
            f"got {in_channels}"
        )


_BASE_64 = dict(input_size=64, dim=192, multipliers=(1, 2, 3, 4), num_res_blocks=3, order="new")
_UP = dict(in_channels=6, low_res=True, dim=192, multipliers=(1, 1, 2, 2, 4, 4))

register(
    ADM,
    dict(
        adm_base_64=_BASE_64,
        adm_base_128=dict(input_size=128, multipliers=(1, 1, 2, 3, 4), heads=4),
        adm_256=dict(input_size=256, multipliers=(1, 1, 2, 2, 4, 4)),
        adm_512=dict(input_size=512, multipliers=(0.5, 1, 1, 2, 2, 4, 4)),
        adm_up_256=_UP | dict(input_size=256, heads=4),
        adm_up_512=_UP | dict(input_size=512, attention_resolutions=(32, 16)),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=16,
    ),
    aliases={"attention_at": "attention_resolutions"},
    exceptions=Exceptions(
        sizes=(12, 16),
        no_null_label="the authors guide by a classifier, so no published model has a null label",
    ),
)
