"""Parts that several families share. N batch, C channels, T tokens, D width, (H, W) grid."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels


class Linear(nn.Linear):
    """torch's, by the fastest implementation: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Pointwise(nn.Conv2d):
    """torch's 1x1 convolution, by the fastest implementation: (N, C, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pointwise(x, self.weight, self.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoid of `frequency_dim` values (cosines first), then an MLP: (N,) -> (N, D). Time is taken as it is."""

    def __init__(self, dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(Linear(frequency_dim, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(t, self.frequency_dim).to(self.mlp[0].weight.dtype))


def timestep_sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos(t w), sin(t w)], w_i = 10000^(-2i/dim), in float32: (N,) -> (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LabelEmbedder(nn.Module):
    """A row per class and one, the last, for the null label: (N,) -> (N, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, row-major: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """3x3 convolution into the first stage: (N, C, H, W) -> (N, D, H, W)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Mlp(nn.Module):
    """Two linear layers around a GELU (`approximate` as in torch: 'none' is erf, 'tanh' is DiT's)."""

    def __init__(self, dim: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel, eps 1e-6, without parameters: (N, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN's x * (1 + scale) + shift; shift and scale broadcast against x."""
    return kernels.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """adaLN-Zero's x + gate * branch; gate broadcasts against both."""
    return kernels.addcmul(x, gate, branch)


class GlobalPool(nn.Module):
    """The mean of each channel: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pool(x)


def adaln2d(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels of each pixel, shifted and scaled: (N, C, H, W), (N, C, 1, 1) twice -> (N, C, H, W)."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, HW, C), as it lies where channels are last
    rows = kernels.adaln(rows, shift.flatten(1)[:, None], scale.flatten(1)[:, None])
    return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """3x3 convolution to half the channels, then pixel-unshuffle: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """3x3 convolution to twice the channels, then pixel-shuffle: (N, C, H, W) -> (N, C/2, 2H, 2W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ConvFinal(nn.Module):
    """DiCo's head: LayerNorm2d, adaLN shift and scale, 3x3 convolution: (N, D, H, W), c (N, D) -> (N, C_out, H, W)."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm2d()
        self.out_proj = nn.Conv2d(dim, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[..., None, None].chunk(2, dim=1)
        return self.out_proj(modulate(self.norm_final(x), shift, scale))


class PatchFinal(nn.Module):
    """DiT's head: LayerNorm, adaLN shift and scale, linear to patches: (N, T, D), c (N, D) -> (N, T, p*p*C_out)."""

    def __init__(self, dim: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(dim, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens of (patch row, patch column, channel) to an image: (N, T, p*p*C) -> (N, C, H, W)."""
    height, width = grid
    x = x.reshape(len(x), height, width, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, height * patch, width * patch)


def sincos_position(dim: int, grid: tuple[int, int]) -> Tensor:
    """DiT's fixed 2-D position embedding (1, T, dim): the first half encodes the column, the second the row.

    Each half is [sin(pos w), cos(pos w)] with w_j = 10000^(-4j/dim), computed in float64.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [np.outer(position.reshape(-1), frequencies) for position in (column, row)]
    table = np.concatenate(
        [part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1
    )
    return torch.tensor(table, dtype=torch.float32)[None]


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases on every Linear and Conv2d (4-D fans); N(0, 0.02) label tables."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
    for embedder in module.modules():
        if isinstance(embedder, TimestepEmbedder):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)


def xavier_flat_(conv: nn.Conv2d) -> None:
    """Re-draw a stem convolution with Xavier fans of its [out, in*k*k] view."""
    nn.init.xavier_uniform_(conv.weight.view(len(conv.weight), -1))


def zero_(*layers: nn.Linear | nn.Conv2d) -> None:
    """Zero weights and biases: adaLN-Zero and heads start as the identity and as nothing."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def check_grid(x: Tensor, input_size: int | None, multiple: int, family: str) -> None:
    """Raise ValueError where a family cannot take inputs of this height and width."""
    height, width = x.shape[-2:]
    if input_size is not None and (height, width) != (input_size, input_size):
        raise ValueError(
            f"this {family} takes inputs of {input_size}x{input_size}, got {height}x{width}; build it with input_size={height}"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"{family} takes heights and widths divisible by {multiple}, got {height}x{width}"
        )


def check_stages(dim: int, multiple: int, **per_stage: tuple[int, ...] | None) -> None:
    """Raise ValueError where a U-shape's width or its options for five stages do not fit."""
    if dim % multiple:
        raise ValueError(f"this U-shape needs dim divisible by {multiple}, got {dim}")
    for name, values in per_stage.items():
        if values is not None and len(values) != 5:
            raise ValueError(f"{name} takes five numbers, one a stage, got {values}")


def check_size(x: Tensor, size: tuple[int, int], part: str) -> None:
    """Raise ValueError where a part was built for another grid than x (N, C, H, W) has."""
    if tuple(x.shape[-2:]) != size:
        raise ValueError(
            f"this {part} was built for a grid of {size}, got {tuple(x.shape[-2:])}; build it with the input size it is to take"
        )
