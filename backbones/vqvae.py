"""VAR's tokenizer, a multi-scale residual VQVAE: Tian et al., NeurIPS 2024, section 3.2.

Source: arXiv:2404.02905 and github.com/FoundationVision/VAR at 78b9539.

An encoder makes features of an image. They are quantised scale by scale, from coarse to fine: every
scale codes what the coarser ones left. The decoder makes an image of their sum.

Legend: N images, C channels of a code, V codes, S scales, p_i side and l_i = p_i^2 tokens of a
scale, P the side of the last scale, L tokens of all scales, D width of a level, (H, W) its grid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.registry import register
from backbones.var import SIDES_256, check_sides

# Which of four convolutions serves each of ten scales: the authors' rule has two exact ties there.
PHIS_OF_TEN = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
COMMITMENT = 0.25  # weight of the loss that draws features to their codes


class Quantised(NamedTuple):
    """Features as tokens, and what becomes of the tokens."""

    tokens: Tensor  # (N, L), all scales in order
    features: Tensor  # (N, C, P, P), the sum of all scales
    inputs: Tensor  # (N, L - 1, C), what a network sees from the second scale on
    loss: Tensor  # how far features and partial sums are from one another


class ResidualBlock(nn.Module):
    """Two norms and convolutions around a residual: (N, D, H, W) -> (N, D_out, H, W)."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(dim)
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm2 = group_norm(dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Attend among all pixels with one head: (N, D, H, W) -> (N, D, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).mT  # (N, HW, 3D)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # 3 x (N, 1, HW, D)
        h = kernels.attention(q, k, v)[:, 0].mT  # (N, D, HW)
        return x + self.proj_out(h.reshape(x.shape))


class Halve(nn.Module):
    """Pad on the right and below, then convolve with stride 2: (N, D, H, W) -> (N, D, H/2, W/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Repeat pixels, then convolve: (N, D, H, W) -> (N, D, 2H, 2W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level attends.

    The network that it belongs to may add a layer that leads to the next resolution.
    """

    def __init__(
        self, dim: int, dim_out: int, blocks: int, attention: type[nn.Module] | None
    ) -> None:
        super().__init__()
        widths = [dim] + [dim_out] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, dim_out) for width in widths)
        self.attn = nn.ModuleList(attention(dim_out) for _ in range(blocks) if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for layer in (self.downsample, self.upsample):
            if layer is not None:
                x = layer(x)
        return x


class Middle(nn.Module):
    """A residual block on either side of attention: (N, D, H, W) -> (N, D, H, W)."""

    def __init__(self, dim: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(dim, dim)
        self.attn_1 = attention(dim)
        self.block_2 = ResidualBlock(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to features; the last level attends: (N, 3, H, W) -> (N, C, H/f, W/f)."""

    def __init__(
        self,
        image_channels: int,
        channels: int,
        widths: list[int],
        blocks: int,
        attention: type[nn.Module] = PixelAttention,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)

        # The first level keeps the stem's width, which the authors' multipliers begin with.
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            attends = attention if index == last else None
            level = Level(widths[max(index - 1, 0)], width, blocks, attends)
            if index < last:
                level.downsample = Halve(width)
            self.down.append(level)
        self.mid = Middle(widths[last], attention)
        self.norm_out = group_norm(widths[last])
        self.conv_out = nn.Conv2d(widths[last], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features to images, with one more block a level: (N, C, H/f, W/f) -> (N, 3, H, W)."""

    def __init__(
        self,
        image_channels: int,
        channels: int,
        widths: list[int],
        blocks: int,
        attention: type[nn.Module] = PixelAttention,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[last], 3, padding=1)
        self.mid = Middle(widths[last], attention)

        # The levels lie from fine to coarse and run from coarse to fine.
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            attends = attention if index == last else None
            level = Level(widths[min(index + 1, last)], width, blocks + 1, attends)
            if index > 0:
                level.upsample = Double(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class SharedPhi(nn.Module):
    """The convolutions that follow the resizing of codes; several scales share one."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(number)
        )


class Quantiser(nn.Module):
    """The codes, and the convolutions between scales."""

    def __init__(self, sides: tuple[int, ...], vocabulary: int, channels: int, phi: int) -> None:
        super().__init__()
        self.phis = assign_phis(len(sides), phi)
        self.embedding = nn.Embedding(vocabulary, channels)
        self.quant_resi = SharedPhi(channels, phi)
        # The authors count here how often codes are used; nothing reads it.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(sides), vocabulary))

    def nearest(self, z: Tensor) -> Tensor:
        """Return the nearest codes by squared distance, (M, C) -> (M,); ties to the lower index."""
        codes = self.embedding.weight
        distances = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T
        return distances.argmin(dim=1)

    def blend(self, scale: int, h: Tensor) -> Tensor:
        """Take the mean of codes at full size and their convolution: (N, C, P, P) -> same."""
        return 0.5 * h + 0.5 * self.quant_resi.qresi_ls[self.phis[scale]](h)


class VQVAE(nn.Module):
    """The tokenizer: its encoder, codes and decoder.

    `ch` is the width of the finest level and `ch_mult` multiplies it at every level. `phi` is the
    number of convolutions that scales share.
    """

    def __init__(
        self,
        *,
        sides: tuple[int, ...] = SIDES_256,
        vocabulary: int = 4096,
        channels: int = 32,
        image_channels: int = 3,
        ch: int = 160,
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        phi: int = 4,
    ) -> None:
        super().__init__()
        if ch % 32:
            raise ValueError(f"the VQVAE normalises 32 groups: ch must divide by 32, got {ch}")
        self.sides = check_sides(sides, "the VQVAE")
        self.vocabulary = vocabulary
        self.channels = channels
        self.image_channels = image_channels
        self.lengths = [side**2 for side in self.sides]
        self.factor = 2 ** (len(ch_mult) - 1)
        self.input_size = self.sides[-1] * self.factor

        widths = [ch * multiplier for multiplier in ch_mult]
        self.encoder = Encoder(image_channels, channels, widths, res_blocks)
        self.decoder = Decoder(image_channels, channels, widths, res_blocks)
        self.quantize = Quantiser(self.sides, vocabulary, channels, phi)
        self.quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (N, 3, H, W), not clamped, and the quantisation's loss.

        Gradients pass the quantisation as if it changed nothing.
        """
        features = self.encode(images)
        quantised = self.quantise(features)
        straight = features + (quantised.features - features).detach()
        return self.decoder(self.post_quant_conv(straight)), quantised.loss

    def encode(self, images: Tensor) -> Tensor:
        """Return features (N, C, P, P) of images (N, 3, H, W) in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        size = self.input_size
        if images.shape[-2:] != (size, size):
            raise ValueError(
                f"this VQVAE takes images of {size}x{size}, got "
                f"{images.shape[-2]}x{images.shape[-1]}; build it with other sides"
            )
        return self.quant_conv(self.encoder(images))

    def decode(self, features: Tensor) -> Tensor:
        """Return images (N, 3, H, W) in [-1, 1] of features (N, C, P, P)."""
        return self.decoder(self.post_quant_conv(features)).clamp(-1, 1)

    def quantise(self, features: Tensor) -> Quantised:
        """Quantise features (N, C, P, P) scale by scale, and keep what each scale leaves."""
        side = self.sides[-1]
        target = features.detach()
        rest, total = target, torch.zeros_like(target)
        tokens, inputs, losses = [], [], []
        for scale, own in enumerate(self.sides):
            z = rest if own == side else F.interpolate(rest, (own, own), mode="area")
            index = self.quantize.nearest(z.permute(0, 2, 3, 1).reshape(-1, self.channels))
            tokens.append(index.view(len(features), -1))  # (N, l_i)

            # The sum learns from the features, and the features are drawn to the sum.
            part = self.contribution(scale, tokens[-1])
            total, rest = total + part, rest - part.detach()
            losses.append(F.mse_loss(total, target))
            losses.append(COMMITMENT * F.mse_loss(features, total.detach()))
            if own != side:
                inputs.append(self.next_input(total, scale + 1))

        empty = features.new_zeros(len(features), 0, self.channels)
        return Quantised(
            torch.cat(tokens, dim=1),
            total,
            torch.cat([empty, *inputs], dim=1),
            torch.stack(losses).sum() / len(self.sides),
        )

    def contribution(self, scale: int, tokens: Tensor) -> Tensor:
        """Return what the tokens of a scale, (N, l_i), add to the features: (N, C, P, P)."""
        side, last = self.sides[scale], self.sides[-1]
        h = self.quantize.embedding(tokens).mT.reshape(len(tokens), self.channels, side, side)
        if side != last:
            h = F.interpolate(h, (last, last), mode="bicubic")
        return self.quantize.blend(scale, h)

    def next_input(self, features: Tensor, scale: int) -> Tensor:
        """Return what a network sees of features before it draws a scale: (N, l_i, C)."""
        side = self.sides[scale]
        return F.interpolate(features, (side, side), mode="area").flatten(2).mT

    def inputs(self, tokens: Tensor) -> Tensor:
        """Return a network's inputs from the second scale on, (N, L - 1, C), of tokens (N, L)."""
        maps = tokens.split(self.lengths, dim=1)
        side = self.sides[-1]
        total = self.quantize.embedding.weight.new_zeros(len(tokens), self.channels, side, side)
        inputs = [total.new_zeros(len(tokens), 0, self.channels)]
        for scale in range(len(self.sides) - 1):
            total = total + self.contribution(scale, maps[scale])
            inputs.append(self.next_input(total, scale + 1))
        return torch.cat(inputs, dim=1)


def group_norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, dim, eps=1e-6)


def assign_phis(scales: int, number: int) -> tuple[int, ...]:
    """Return which convolution serves each scale: the nearest on a common axis from 0 to 1."""
    if (scales, number) == (10, 4):
        return PHIS_OF_TEN
    ticks = np.linspace(1 / 3 / number, 1 - 1 / 3 / number, number)
    places = [scale / max(scales - 1, 1) for scale in range(scales)]
    return tuple(int(np.abs(ticks - place).argmin()) for place in places)


register(
    VQVAE,
    dict(vqvae_ch160=dict()),
    tiny=dict(sides=(1, 2, 3), vocabulary=40, channels=6, ch=32, ch_mult=(1, 2), res_blocks=1),
    kind="tokenizer",
)
