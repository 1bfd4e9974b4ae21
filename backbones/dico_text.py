"""DiCo for text, a reconstruction: "Revitalizing ConvNets", version 2, 2025.

Source: arXiv:2505.11196v2, section 3.3 and algorithm 1. Neither code nor sizes are published, so
what the text leaves open is a choice of this project: no pooled vector unless `pooled_dim` asks for
it, a residual without norm or gate, one MLP for kernels per block, heads of 32 channels.

Every DiCo block reads the caption after its conv module, in one of two ways. DiCo-CrossAttn has the
cross-attention of PixArt-alpha (arXiv:2310.00426). DiCo-DWC makes depthwise kernels of the tokens:
token i is tap i of every channel, and the last token is repeated up to an odd square.

Legend: N batch, C width of a stage (D, 2D, 4D), (H, W) grid of a stage, T = HW, L tokens of text,
K their width, P width of a pooled vector, h heads, e = C / h, S an odd square, at least L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from backbones.captions import Captions, Text, TextNetwork, Work
from backbones.dico import DiCoBlock
from backbones.kernels import adaln2d, attention, sample_depthwise
from backbones.layers import (
    ConvFinal,
    ConvStem,
    Downsample,
    Linear,
    Pointwise,
    TimestepEmbedder,
    Upsample,
    check_grid,
    check_stages,
    gated,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.registry import register


class CrossAttention(nn.Module):
    """Attend from every pixel to the tokens of the text: (N, C, H, W) -> same."""

    called_apart = ("kv_linear",)

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def prepare(self, context: Tensor) -> Tensor:
        """Project the embedded text to keys and values: (N, L, C) -> (N, L, 2C)."""
        return self.kv_linear(context)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        q = self._split(self.q_linear(x.flatten(2).transpose(1, 2)))  # (N, h, T, e)
        k, v = map(self._split, keys_values.chunk(2, dim=-1))  # (N, h, L, e) twice
        h = attention(q, k, v).transpose(1, 2).flatten(2)  # (N, T, C)
        return self.proj(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def close(self) -> None:
        """Start without an effect."""
        zero_(self.proj)


class DynamicConv(nn.Module):
    """Convolve every channel with the kernel that the text gives it: (N, C, H, W) -> same."""

    called_apart = ("mlp",)

    def __init__(self, dim: int, dim_context: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(dim_context, dim), nn.GELU(), Linear(dim, dim))

    def prepare(self, context: Tensor) -> Tensor:
        """Make taps of tokens, and repeat the last one: (N, L, K) -> (N, S, C)."""
        taps = self.mlp(context)  # (N, L, C)
        missing = square_above(taps.shape[1]) - taps.shape[1]
        return torch.cat([taps, taps[:, -1:].expand(-1, missing, -1)], dim=1)

    def forward(self, x: Tensor, taps: Tensor) -> Tensor:
        return sample_depthwise(x, taps)  # (N, C, H, W)

    def close(self) -> None:
        """Start without an effect."""
        zero_(self.mlp[2])


def square_above(tokens: int) -> int:
    """Return the smallest square of an odd number that is not below `tokens`."""
    side = math.isqrt(tokens - 1) + 1
    return (side + 1 - side % 2) ** 2


class TextBlock(DiCoBlock):
    """A DiCo block that reads the text between its conv module and its feed-forward network."""

    def __init__(self, dim: int, mlp_ratio: float, text: CrossAttention | DynamicConv) -> None:
        super().__init__(dim, mlp_ratio)
        self.text = text

    def forward(self, x: Tensor, c: Tensor, work: Tensor) -> Tensor:  # type: ignore[override]
        modulation = self.adaLN_modulation(c)[..., None, None].chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, C, 1, 1)
        x = gated(x, gate1, self.convolve(adaln2d(x, shift1, scale1)))  # (N, C, H, W)
        x = x + self.text(x, work)  # (N, C, H, W)
        return self.feed_forward(x, shift2, scale2, gate2)  # (N, C, H, W)


class TextDiCo(TextNetwork):
    """DiCo's U-shape, whose blocks read the text. A subclass says how.

    `vocabulary` puts a word encoder into the network, for tables of ids in place of states.
    `head_dim` is of DiCo-CrossAttn alone.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        dim: int = 128,
        depths: tuple[int, int, int, int, int] = (5, 4, 4, 4, 4),
        mlp_ratio: float = 2.0,
        context_tokens: int = 77,
        context_dim: int = 768,
        pooled_dim: int | None = None,
        vocabulary: int | None = None,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        if input_size % 4:
            raise ValueError(
                f"DiCo halves its input twice: input_size must be divisible by 4, got {input_size}"
            )
        check_stages(dim, 2, depths=depths)
        self.input_size = input_size
        self.in_channels = self.out_channels = in_channels
        self.num_classes = num_classes
        d1, d2, d3 = dim, 2 * dim, 4 * dim

        self.captions = Captions(num_classes, context_tokens, context_dim, pooled_dim, vocabulary)
        reader = self.make_reader(context_dim, head_dim)

        def stage(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(TextBlock(width, mlp_ratio, reader(width)) for _ in range(depth))

        self.x_embedder = ConvStem(in_channels, d1)
        self.t_embedder_1 = TimestepEmbedder(d1)
        self.t_embedder_2 = TimestepEmbedder(d2)
        self.t_embedder_3 = TimestepEmbedder(d3)
        self.add_embedders(context_dim, (d1, d2, d3))
        self.pooled_embedders = nn.ModuleList()
        if pooled_dim is not None:
            for width in (d1, d2, d3):
                mlp = nn.Sequential(Linear(pooled_dim, width), nn.SiLU(), Linear(width, width))
                self.pooled_embedders.append(mlp)

        self.encoder_level_1 = stage(d1, depths[0])
        self.down1_2 = Downsample(d1)
        self.encoder_level_2 = stage(d2, depths[1])
        self.down2_3 = Downsample(d2)
        self.latent = stage(d3, depths[2])
        self.up3_2 = Upsample(d3)
        self.reduce_chan_level2 = Pointwise(2 * d2, d2)
        self.decoder_level_2 = stage(d2, depths[3])
        self.up2_1 = Upsample(d2)
        self.reduce_chan_level1 = Pointwise(2 * d1, d2)
        self.decoder_level_1 = stage(d2, depths[4])
        self.final_layer = ConvFinal(d2, self.out_channels)
        self._init_weights()

    def make_reader(
        self, context_dim: int, head_dim: int
    ) -> Callable[[int], CrossAttention | DynamicConv]:
        """Return what builds the part of a block that reads the text, from the block's width."""
        raise NotImplementedError

    def add_embedders(self, context_dim: int, dims: tuple[int, int, int]) -> None:
        """Add what embeds the text for all blocks of a width."""

    def embed_context(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed the text for each of the three widths: (N, L, K) -> three times (N, L, K or C)."""
        return context, context, context

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        blocks = [block for block in self.modules() if isinstance(block, TextBlock)]
        zero_modulation(blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.out_proj)

        # A fresh network ignores the text, as adaLN-Zero ignores everything.
        for block in blocks:
            block.text.close()
        for mlp in self.pooled_embedders:
            zero_(mlp.get_submodule("2"))
        self.captions.init_weights()

    def _stages(self) -> Iterator[tuple[int, nn.ModuleList]]:
        """Yield the stages in the order of their use, each with the place of its width."""
        yield 0, self.encoder_level_1
        yield 1, self.encoder_level_2
        yield 2, self.latent
        yield 1, self.decoder_level_2
        yield 1, self.decoder_level_1

    def text_work(self, text: Text) -> Work:
        contexts = self.embed_context(text.context)
        work: list[Tensor] = [mlp(text.pooled) for mlp in self.pooled_embedders]
        for width, stage in self._stages():
            for block in stage:
                assert isinstance(block, TextBlock)
                work.append(block.text.prepare(contexts[width]))
        return tuple(work)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text) -> Tensor:
        check_grid(x, None, 4, "DiCo")
        work = iter(self.read(y))
        c = [embed(t) for embed in (self.t_embedder_1, self.t_embedder_2, self.t_embedder_3)]
        if self.pooled_embedders:
            c = [time + next(work) for time in c]
        c1, c2, c3 = c  # (N, D), (N, 2D), (N, 4D)

        def run(stage: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
            for block in stage:
                x = block(x, c, next(work))
            return x

        # Encoder and middle.
        x1 = run(self.encoder_level_1, self.x_embedder(x), c1)  # (N, D, H, W)
        x2 = run(self.encoder_level_2, self.down1_2(x1), c2)  # (N, 2D, H/2, W/2)
        x3 = run(self.latent, self.down2_3(x2), c3)  # (N, 4D, H/4, W/4)

        # Decoder: join the encoder's output and reduce the channels.
        u2 = torch.cat([self.up3_2(x3), x2], dim=1)  # (N, 4D, H/2, W/2)
        u2 = run(self.decoder_level_2, self.reduce_chan_level2(u2), c2)  # (N, 2D, H/2, W/2)
        u1 = torch.cat([self.up2_1(u2), x1], dim=1)  # (N, 2D, H, W)
        u1 = run(self.decoder_level_1, self.reduce_chan_level1(u1), c2)  # (N, 2D, H, W)
        return self.final_layer(u1, c2)  # (N, C_out, H, W)


class CrossDiCo(TextDiCo):
    """DiCo-CrossAttn: blocks attend to the tokens, which an MLP per width embeds."""

    def make_reader(
        self, context_dim: int, head_dim: int
    ) -> Callable[[int], CrossAttention | DynamicConv]:
        def attend(width: int) -> CrossAttention:
            if width % head_dim:
                raise ValueError(
                    f"DiCo-CrossAttn needs widths divisible by head_dim {head_dim}, got {width}"
                )
            return CrossAttention(width, width // head_dim)

        return attend

    def add_embedders(self, context_dim: int, dims: tuple[int, int, int]) -> None:
        def embedder(width: int) -> nn.Sequential:
            gelu = nn.GELU(approximate="tanh")
            return nn.Sequential(Linear(context_dim, width), gelu, Linear(width, width))

        self.context_embedder_1 = embedder(dims[0])
        self.context_embedder_2 = embedder(dims[1])
        self.context_embedder_3 = embedder(dims[2])

    def embed_context(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.context_embedder_1(context),
            self.context_embedder_2(context),
            self.context_embedder_3(context),
        )


class DynamicDiCo(TextDiCo):
    """DiCo-DWC: blocks convolve with kernels that the tokens make."""

    def make_reader(
        self, context_dim: int, head_dim: int
    ) -> Callable[[int], CrossAttention | DynamicConv]:
        return lambda width: DynamicConv(width, context_dim)


# The sizes are DiCo's own. Of a published row, L is the one that rivals would be compared with.
_SIZES = dict(
    s=dict(dim=128, depths=(5, 4, 4, 4, 4)),
    b=dict(dim=256, depths=(5, 4, 4, 4, 4)),
    l=dict(dim=352, depths=(9, 8, 9, 8, 9)),
    xl=dict(dim=416, depths=(9, 9, 10, 9, 9)),
)
_TINY = dict(depths=(2, 1, 1, 1, 1), context_tokens=5, context_dim=10)

register(
    CrossDiCo,
    {f"dico_cross_{size}_t2i": options for size, options in _SIZES.items()},
    tiny=_TINY | dict(dim=12, head_dim=6),
)
register(
    DynamicDiCo,
    {f"dico_dwc_{size}_t2i": options for size, options in _SIZES.items()},
    tiny=_TINY | dict(dim=12),
)
