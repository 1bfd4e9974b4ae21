"""Parts that several families share.

Legend: N batch, C channels, T tokens, D width, h heads, e = D / h, p patch, (H, W) grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels


class Linear(nn.Linear):
    """Apply torch's linear layer by its fastest implementation: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Pointwise(nn.Conv2d):
    """Apply a 1x1 convolution by its fastest implementation: (N, C, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pointwise(x, self.weight, self.bias)


class Conv3x3(nn.Conv2d):
    """Apply a 3x3 convolution by its fastest implementation: (N, C, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.conv3x3(x, self.weight, self.bias)


# Conditioning


def timestep_sinusoid(t: Tensor, dim: int, divisor: int | None = None) -> Tensor:
    """Embed time as [cos(t w), sin(t w)] in float32: (N,) -> (N, dim); w_i = 10000^(-i/divisor)."""
    half = dim // 2  # the divisor if none is given
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * exponents / (divisor or half))  # (dim/2,)
    angles = t[:, None].float() * frequencies  # (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, dim)


def embed_time(
    mlp: nn.Sequential, t: Tensor, frequency_dim: int, divisor: int | None = None
) -> Tensor:
    """Embed time by a sinusoid and an MLP, in the MLP's dtype: (N,) -> (N, D)."""
    first = mlp[0]
    assert isinstance(first, nn.Linear)
    return mlp(timestep_sinusoid(t, frequency_dim, divisor).to(first.weight.dtype))


class TimestepEmbedder(nn.Module):
    """Embed time by a sinusoid of `frequency_dim` values and an MLP: (N,) -> (N, D).

    Time is taken as it is: a family whose time runs from 0 to 1 does not scale it.
    """

    def __init__(self, dim: int, frequency_dim: int = 256, divisor: int | None = None) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.divisor = divisor
        self.mlp = nn.Sequential(Linear(frequency_dim, dim), nn.SiLU(), Linear(dim, dim))

    def init_weights(self) -> None:
        """Draw both weights from N(0, 0.02), as DiT does."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        return embed_time(self.mlp, t, self.frequency_dim, self.divisor)


class LabelEmbedder(nn.Module):
    """Look up a row per class and a last row for the null label: (N,) -> (N, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


# Stems


class PatchEmbed(nn.Module):
    """Project non-overlapping patches to tokens, row-major: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Convolve 3x3 into the first stage: (N, C, H, W) -> (N, D, H, W)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = Conv3x3(in_channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


# Blocks


class SelfAttention(nn.Module):
    """Attend among all tokens with softmax attention: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, -1)  # (N, T, 3, h, e)
        q, k, v = kernels.unpack(qkv)  # 3 x (N, h, T, e)
        h = kernels.attention(q, k, v)  # (N, h, T, e)
        return self.proj(h.transpose(1, 2).reshape(n, t, d))  # (N, T, D)


class Mlp(nn.Module):
    """Apply two linear layers around a GELU: (N, T, D) -> (N, T, D).

    `approximate` is torch's: 'none' is the exact GELU by erf, 'tanh' is the one of DiT.
    """

    def __init__(self, dim: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGlu(nn.Module):
    """Apply a gated MLP without biases, w2(SiLU(w1 x) * w3 x): (N, T, D) -> (N, T, D).

    `linear` makes its layers from their numbers of inputs and outputs.
    """

    def __init__(
        self, dim: int, hidden: int, linear: Callable[[int, int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        linear = linear or partial(Linear, bias=False)
        self.w1 = linear(dim, hidden)
        self.w3 = linear(dim, hidden)
        self.w2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, then weigh: (..., D) -> (..., D).

    The quotient is at least in float32. It is written out so that counters see its products.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        real = x.to(torch.promote_types(x.dtype, torch.float32))
        real = real * torch.rsqrt(real.square().mean(-1, keepdim=True) + self.eps)
        return real.to(x.dtype) * self.weight


class LayerNorm2d(nn.Module):
    """Normalise the channels of each pixel, eps 1e-6, without parameters: (N, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute adaLN's x * (1 + scale) + shift; shift and scale broadcast against x."""
    return kernels.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Compute adaLN-Zero's x + gate * branch; the gate broadcasts against both."""
    return kernels.addcmul(x, gate, branch)


class GlobalPool(nn.Module):
    """Average each channel over the grid: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pool(x)


# Stages


def run_stage(stage: Iterable[nn.Module], x: Tensor, *conditions: Tensor) -> Tensor:
    """Run the blocks of a stage one after the other, each with the same conditions."""
    for block in stage:
        x = block(x, *conditions)
    return x


def run_layers(block: nn.Module, x: Tensor, conditions: dict[type[nn.Module], Any]) -> Tensor:
    """Run a block's layers one after the other, each with the condition listed for its type."""
    for layer in block.children():
        found = (condition for kind, condition in conditions.items() if isinstance(layer, kind))
        condition = next(found, None)
        x = layer(x) if condition is None else layer(x, condition)
    return x


class Downsample(nn.Module):
    """Convolve 3x3 to half the channels, then unshuffle: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # A body of one layer keeps the authors' names: their shuffle has no weights.
        self.body = nn.Sequential(Conv3x3(dim, dim // 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pixel_unshuffle(self.body(x))


class Upsample(nn.Module):
    """Convolve 3x3 to twice the channels, then shuffle: (N, C, H, W) -> (N, C/2, 2H, 2W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # A body of one layer keeps the authors' names: their shuffle has no weights.
        self.body = nn.Sequential(Conv3x3(dim, dim * 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pixel_shuffle(self.body(x))


# Heads


class ConvFinal(nn.Module):
    """Apply DiCo's head, adaLN and a 3x3 convolution: (N, D, H, W), (N, D) -> (N, C_out, H, W)."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = Conv3x3(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[..., None, None].chunk(2, dim=1)  # (N, D, 1, 1)
        return self.out_proj(kernels.adaln2d(x, shift, scale))  # (N, C_out, H, W)


class PatchFinal(nn.Module):
    """Apply DiT's head, adaLN and a linear layer: (N, T, D), (N, D) -> (N, T, p*p*C_out).

    `norm` replaces its LayerNorm; `c_dim` is the condition's width if that is not D.
    """

    def __init__(
        self,
        dim: int,
        patch: int,
        out_channels: int,
        norm: nn.Module | None = None,
        c_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_final = norm or nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(dim, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(c_dim or dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # (N, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*C_out)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Turn tokens into images: (N, T, p*p*C) -> (N, C, H*p, W*p).

    A token holds its patch in the order of row, column and channel.
    """
    height, width = grid
    x = x.reshape(len(x), height, width, patch, patch, -1)  # (N, H, W, p, p, C)
    x = torch.einsum("nhwpqc->nchpwq", x)  # (N, C, H, p, W, p)
    return x.reshape(len(x), -1, height * patch, width * patch)  # (N, C, H*p, W*p)


# Initial weights


def xavier_init(module: nn.Module) -> None:
    """Draw the initial weights of DiT and of the families that follow it.

    Every Linear and Conv2d gets Xavier-uniform weights and zero biases. Label tables and time
    embedders are drawn from N(0, 0.02).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
    for layer in module.modules():
        if isinstance(layer, TimestepEmbedder):
            layer.init_weights()


def xavier_flat_(conv: nn.Conv2d) -> None:
    """Draw a stem convolution again, with Xavier fans of its [out, in*k*k] view and no bias."""
    nn.init.xavier_uniform_(conv.weight.view(len(conv.weight), -1))
    zero_bias_(conv)


def zero_bias_(layer: nn.Linear | nn.Conv2d) -> None:
    """Zero a layer's bias if it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def zero_(*layers: nn.Module) -> None:
    """Zero weights and biases, so that a head predicts zero and a residual branch adds nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def zero_modulation(blocks: Iterable[nn.Module]) -> None:
    """Zero the adaLN-Zero modulation of blocks, so that each starts as the identity."""
    for block in blocks:
        zero_(block.get_submodule("adaLN_modulation"))


# Refusals


def check_grid(x: Tensor, input_size: int | None, multiple: int, family: str) -> None:
    """Raise ValueError if a family cannot take inputs of this height and width."""
    height, width = x.shape[-2:]
    if input_size is not None and (height, width) != (input_size, input_size):
        raise ValueError(
            f"this {family} takes inputs of {input_size}x{input_size}, got {height}x{width}; "
            f"build it with input_size={height}"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"{family} takes heights and widths divisible by {multiple}, got {height}x{width}"
        )


def check_stages(dim: int, multiple: int, **per_stage: tuple[int, ...] | None) -> None:
    """Raise ValueError if a U-shape's width or its options for five stages do not fit."""
    if dim % multiple:
        raise ValueError(f"this U-shape needs dim divisible by {multiple}, got {dim}")
    for name, values in per_stage.items():
        if values is not None and len(values) != 5:
            raise ValueError(f"{name} takes five numbers, one per stage, got {values}")


def check_size(x: Tensor, size: tuple[int, int], layer: str) -> None:
    """Raise ValueError if a layer was built for another grid than that of x (N, C, H, W)."""
    if tuple(x.shape[-2:]) != size:
        raise ValueError(
            f"this {layer} was built for a grid of {size}, got {tuple(x.shape[-2:])}; "
            "build it with the input size of its inputs"
        )
