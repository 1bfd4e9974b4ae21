"""ADM: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, section 3, in pixel space.

Four class-conditional base models and the two upsamplers behind "ADM-U". A label has a row only if it is a class:
num_classes, the suite's null label, needs `null_label=True`, which no published model has.
An upsampler is given an image and, after its channels, the low-resolution one resized: twice the image's channels.
Legend: N batch, C width of a layer, E = 4D width of the embedding, h heads, e = C / h, T = HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import Linear, Pointwise, check_grid, modulate, timestep_sinusoid, zero_
from backbones.registry import register

ORDERS = ("legacy", "new")
halve = partial(F.avg_pool2d, kernel_size=2)
double = partial(F.interpolate, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """Two 3x3 convolutions around adaptive group norm (section 3.1); `resample` changes the grid before the first."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        dim_emb: int,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, dim), nn.SiLU(), nn.Conv2d(dim, dim_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(dim_emb, 2 * dim_out))
        # The published base 64 trained with dropout 0.1; a backbone draws no random numbers, so the rate is 0.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, dim_out),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(dim_out, dim_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if dim_out == dim else Pointwise(dim, dim_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        norm1, act, conv1 = self.in_layers
        norm2, *rest = self.out_layers
        h = act(norm1(x))  # (N, C, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)  # (N, C, H', W')
        h = conv1(h)  # (N, C_out, H', W')
        scale, shift = self.emb_layers(c)[..., None, None].chunk(2, dim=1)  # (N, C_out, 1, 1)
        h = modulate(norm2(h), shift, scale)  # (N, C_out, H', W')
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h  # (N, C_out, H', W')


def attend(qkv: Tensor, heads: int, order: str) -> Tensor:
    """(N, 3C, T) -> (N, C, T). The channels are (h, 3, e) in the legacy order and (3, h, e) in the new one."""
    if order == "legacy":
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)  # 3 x (N, h, e, T)
    else:
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # 3 x (N, h, e, T)
    # Not kernels.attention: ADM scales q and k each by e^-1/4, to stay in range in half precision, and its
    # published cost counts both products; the kernel's reference scales q alone.
    scale = q.shape[2] ** -0.25
    weights = ((q * scale).transpose(2, 3) @ (k * scale)).softmax(dim=-1)  # (N, h, T, T)
    return (v @ weights.transpose(2, 3)).flatten(1, 2)  # (N, C, T)


class AttentionBlock(nn.Module):
    """Self-attention over pixels."""

    def __init__(self, dim: int, heads: int, order: str) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = nn.GroupNorm(32, dim)
        self.qkv = nn.Conv1d(dim, 3 * dim, 1)
        self.proj_out = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(2)  # (N, C, T)
        h = attend(self.qkv(self.norm(x)), self.heads, self.order)  # (N, C, T)
        return (x + self.proj_out(h)).view(shape)  # (N, C, H, W)


class ADM(nn.Module):
    """`attention_at` are the grids (pixels a side) whose levels attend; `heads` None means one for every `head_dim`."""

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
        attention_at: tuple[int, ...] = (32, 16, 8),
        heads: int | None = None,
        head_dim: int = 64,
        order: str = "legacy",
        low_res: bool = False,
        null_label: bool = False,
    ) -> None:
        super().__init__()
        widths, last = [int(dim * m) for m in multipliers], len(multipliers) - 1
        if any(dim * m % 32 or dim * m % (heads or head_dim) for m in multipliers):
            raise ValueError(
                f"ADM needs widths divisible by 32 and by {f'heads {heads}' if heads else f'head_dim {head_dim}'}, got {widths}"
            )
        if input_size % 2**last:
            raise ValueError(
                f"ADM halves its input {last} times: input_size must be divisible by {2**last}, got {input_size}"
            )
        if order not in ORDERS:
            raise ValueError(f"unknown attention order {order!r}; known: {', '.join(ORDERS)}")
        if low_res and in_channels % 2:
            raise ValueError(
                f"an upsampler takes an image and its low-resolution one: in_channels must be even, got {in_channels}"
            )
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.out_channels = in_channels // (2 if low_res else 1) * (2 if learn_sigma else 1)
        self.dim, self.multiple, dim_emb = dim, 2**last, 4 * dim

        def layers(width: int, level: int) -> nn.ModuleList:
            """A residual block from `width` channels to the level's, then attention where the level has it."""
            block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
            return (
                block.append(attention(widths[level]))
                if input_size >> level in attention_at
                else block
            )

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, heads or width // head_dim, order)

        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))
        self.label_emb = nn.Embedding(num_classes + null_label, dim_emb)
        width = widths[0]
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])]
        )
        skips = [width]
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                self.input_blocks.append(layers(width, level))
                width = widths[level]
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, dim_emb, halve)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), attention(width), ResBlock(width, width, dim_emb)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(num_res_blocks + 1):
                block = layers(width + skips.pop(), level)
                width = widths[level]
                if level and index == num_res_blocks:
                    block.append(ResBlock(width, width, dim_emb, double))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, self.out_channels, 3, padding=1)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """torch's defaults, but every residual branch and the head start at zero."""
        zero_(self.out[2])
        zero_(*(block.out_layers[3] for block in self.modules() if isinstance(block, ResBlock)))
        zero_(*(block.proj_out for block in self.modules() if isinstance(block, AttentionBlock)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, self.multiple, "ADM")
        sinusoid = timestep_sinusoid(t, self.dim).to(self.time_embed[0].weight.dtype)
        c = self.time_embed(sinusoid) + self.label_emb(y)  # (N, E)
        skips = []
        for block in self.input_blocks:
            x = run_block(block, x, c)  # (N, C, H / 2^level, W / 2^level)
            skips.append(x)
        x = run_block(self.middle_block, x, c)
        for block in self.output_blocks:
            x = run_block(
                block, torch.cat([x, skips.pop()], dim=1), c
            )  # (N, C, H / 2^level, W / 2^level)
        return self.out(x)  # (N, C_out, H, W)


def run_block(block: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    for layer in block:
        x = layer(x, c) if isinstance(layer, ResBlock) else layer(x)
    return x


_UP = dict(in_channels=6, low_res=True, dim=192, multipliers=(1, 1, 2, 2, 4, 4))

register(
    ADM,
    dict(
        adm_base_64=dict(
            input_size=64, dim=192, multipliers=(1, 2, 3, 4), num_res_blocks=3, order="new"
        ),
        adm_base_128=dict(input_size=128, multipliers=(1, 1, 2, 3, 4), heads=4),
        adm_256=dict(input_size=256, multipliers=(1, 1, 2, 2, 4, 4)),
        adm_512=dict(input_size=512, multipliers=(0.5, 1, 1, 2, 2, 4, 4)),
        adm_up_256=_UP | dict(input_size=256, heads=4),
        adm_up_512=_UP | dict(input_size=512, attention_at=(32, 16)),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_at=(8, 4),
        head_dim=16,
    ),
)
