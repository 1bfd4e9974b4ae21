"""The U-Net of LDM and of Stable Diffusion: residual blocks, and transformers over pixels.

Source: arXiv:2112.10752, section 3.3, and github.com/CompVis/latent-diffusion at a506df5. It is
ADM's U-Net without scale and shift, with convolutions that resample, and with transformer blocks
that attend to a context.

Legend: N batch, C width of a layer, (H, W) grid, E = 4D width of the embedding, K context width,
h heads, e = C / h, T = HW tokens, T' tokens of the context. A level is the number of times the
input was halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import Conv3x3, Linear, Pointwise, run_layers, zero_


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the embedding added between them."""

    def __init__(self, dim: int, dim_out: int, dim_emb: int) -> None:
        super().__init__()
        conv1 = Conv3x3(dim, dim_out)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, dim), nn.SiLU(), conv1)
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(dim_emb, dim_out))

        # A dropout of 0 keeps the place of the next layer in the names of the weights.
        norm2 = nn.GroupNorm(32, dim_out)
        conv2 = Conv3x3(dim_out, dim_out)
        self.out_layers = nn.Sequential(norm2, nn.SiLU(), nn.Dropout(0.0), conv2)
        self.skip_connection = nn.Identity() if dim_out == dim else Pointwise(dim, dim_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(c)[..., None, None]  # (N, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)  # (N, C_out, H, W)


class Downsample(nn.Module):
    """Halve the grid by a strided 3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the grid by copies, then convolve 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv3x3(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2H, 2W)


class CrossAttention(nn.Module):
    """Attend from x to a context; self-attention passes x as the context."""

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim_context, dim, bias=False)
        self.to_v = Linear(dim_context, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attend(x, self.to_k(context), self.to_v(context))  # (N, T, C)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from x (N, T, C) to keys and values (N, T', C)."""
        h = self.mix(self._split(self.to_q(x)), self._split(k), self._split(v))  # (N, T, h, e)
        return self.to_out(h.flatten(2))  # (N, T, C)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Weigh the values: (N, h, T, e), twice (N, h, T', e) -> (N, T, h, e)."""
        # Not kernels.attention: LDM scales the logits, and its cost counts those h T T' products.
        # And einsum, because it multiplies by the values of a single token without a matrix
        # product; the published core count leaves such a multiply out.
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)  # (N, h, T, T')
        return torch.einsum("nhqk,nhke->nqhe", weights, v)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Project to values and gates; multiply the values by the GELU of the gates."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # (N, T, 4C)


class FeedForward(nn.Module):
    """Apply a gated MLP to each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (N, T, C)


class TransformerBlock(nn.Module):
    """Attend to the tokens, then to the context, then apply the MLP; each is pre-norm."""

    # What attends to the tokens, and what to the context.
    own: type[CrossAttention] = CrossAttention
    other: type[CrossAttention] = CrossAttention

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = self.own(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = self.other(dim, dim_context, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x  # (N, T, C)
        x = self.attn2(self.norm2(x), context) + x  # (N, T, C)
        return self.ff(self.norm3(x)) + x  # (N, T, C)


class SpatialTransformer(nn.Module):
    """Transformer blocks over pixels, between two 1x1 convolutions: (N, C, H, W) -> same."""

    def __init__(self, dim: int, blocks: Iterable[TransformerBlock]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in: nn.Module = Pointwise(dim, dim)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out: nn.Module = Pointwise(dim, dim)

    def forward(self, x: Tensor, contexts: Iterator[Tensor]) -> Tensor:
        """Transform the pixels; each block takes the next of the contexts."""
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (N, T, C)
        for block in self.transformer_blocks:
            h = block(h, next(contexts))  # (N, T, C)
        return self.proj_out(h.transpose(1, 2).reshape(x.shape)) + x  # (N, C, H, W)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The levels of a U-Net."""

    channels: tuple[int, int]
    """Of input and output."""

    dim: int
    """Width of the stem."""

    widths: list[int]
    """Width of each level."""

    num_res_blocks: int
    """Residual blocks of a level of the encoder; the decoder has one more."""

    depths: tuple[int, ...]
    """Transformer blocks after each residual block of a level; 0 for none."""

    middle: int | None
    """Transformer blocks in the middle; None for no middle at all."""

    transformer: Callable[[int, int], nn.Module]
    """Builds a transformer from its width and its number of blocks."""


class UNet(nn.Module):
    """Encoder, middle and decoder with long skips, whose layers know their conditions by type."""

    def add_blocks(self, plan: Plan) -> None:
        """Add all layers between the noisy image and the prediction."""
        last = len(plan.widths) - 1
        dim_emb = 4 * plan.dim
        self.multiple = 2**last
        self.widths = list(plan.widths)
        self.num_res_blocks = plan.num_res_blocks
        self.depths = plan.depths
        self.middle_depth = plan.middle

        def level_block(width: int, level: int) -> nn.ModuleList:
            """Build a residual block to the level's width; add a transformer if it attends."""
            block = nn.ModuleList([ResBlock(width, plan.widths[level], dim_emb)])
            if depth := plan.depths[level]:
                block.append(plan.transformer(plan.widths[level], depth))
            return block

        # The encoder keeps the width of every output: the decoder joins them last in, first out.
        width = plan.dim
        stem = Conv3x3(plan.channels[0], width)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        skips = [width]
        for level in range(last + 1):
            for _ in range(plan.num_res_blocks):
                self.input_blocks.append(level_block(width, level))
                width = plan.widths[level]
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)

        self.middle_block = nn.ModuleList()
        if plan.middle is not None:
            self.middle_block.append(ResBlock(width, width, dim_emb))
            self.middle_block.append(plan.transformer(width, plan.middle))
            self.middle_block.append(ResBlock(width, width, dim_emb))

        # The decoder has one block more per level, which joins the output of the halving.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(plan.num_res_blocks + 1):
                block = level_block(width + skips.pop(), level)
                width = plan.widths[level]
                if level and index == plan.num_res_blocks:
                    block.append(Upsample(width))
                self.output_blocks.append(block)

        head = Conv3x3(width, plan.channels[1])
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), head)

    def init_weights(self) -> None:
        """Keep torch's defaults, but start the head and every residual branch at zero."""
        zero_(self.out[2])
        for block in self.modules():
            if isinstance(block, ResBlock):
                zero_(block.out_layers[3])
            elif isinstance(block, SpatialTransformer):
                zero_(block.proj_out)

    def denoise(self, x: Tensor, conditions: dict[type[nn.Module], Any]) -> Tensor:
        """Run all layers: (N, C, H, W) -> (N, C_out, H, W)."""
        skips = []
        for block in self.input_blocks:
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
            skips.append(x)
        x = run_layers(self.middle_block, x, conditions)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
        return self.out(x)  # (N, C_out, H, W)


def take_network(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the U-Net's averaged weights out of a checkpoint of the authors; None if it is none.

    The averages lie under model_ema, in names without dots.
    """
    prefix = "model.diffusion_model."
    network = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            averaged = "model_ema." + f"diffusion_model.{own}".replace(".", "")
            network[own] = weights.get(averaged, weight)
    return network or None


def check_levels(family: str, input_size: int, widths: list[int], divisor: int) -> None:
    """Raise ValueError for widths that do not split and for inputs that cannot be halved."""
    if any(width % 32 or width % divisor for width in widths):
        raise ValueError(
            f"{family} needs widths divisible by 32 and by heads or head_dim {divisor}, "
            f"got {widths}"
        )
    last = len(widths) - 1
    if input_size % 2**last:
        raise ValueError(
            f"{family} halves its input {last} times: input_size must be divisible by {2**last}, "
            f"got {input_size}"
        )
