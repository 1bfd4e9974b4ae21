"""U-DiT: Tian et al., "U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers", NeurIPS 2024.

Source: arXiv:2405.02730 and github.com/YuchuanTian/U-DiT at 7fcce5e.

The full-resolution decoder and the head are 2D wide and conditioned by c2, as in DiCo. The authors'
three label embedders each draw their own label dropout, so all three see the null label in 1 of
1000 samples. Here dropout is the trainer's: one draw for all three.

Legend: N batch, C width of a stage (D, 2D, 4D), (H, W) grid of a stage, h heads (the same at all
stages), e = C / h, r FFN ratio, T = HW / 4 tokens of one of the four sub-grids of the attention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (
    Conv3x3,
    ConvFinal,
    ConvStem,
    Downsample,
    LabelEmbedder,
    LayerNorm2d,
    Linear,
    Pointwise,
    TimestepEmbedder,
    Upsample,
    check_grid,
    gated,
    modulate,
    run_stage,
    xavier_flat_,
    xavier_init,
    zero_,
)
from backbones.registry import Exceptions, register
from backbones.rotary import rotate_pairs


class DownsampledAttention(nn.Module):
    """Cosine attention within each of four sub-grids of a depthwise-filtered map.

    A sub-grid holds every second pixel of every second row. All four share one set of weights.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.to_qkv = Linear(dim, 3 * dim)
        self.to_out = Pointwise(dim, dim)
        self.downsampler = nn.ModuleDict({"layer": nn.Conv2d(dim, dim, 5, padding=2, groups=dim)})

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        n, c, height, width = x.shape
        x = x + self.downsampler["layer"](x)  # (N, C, H, W)

        # Split into sub-grids, one batch entry each.
        x = x.reshape(n, c, height // 2, 2, width // 2, 2)
        x = x.permute(0, 3, 5, 2, 4, 1)  # (N, 2, 2, H/2, W/2, C)
        qkv = self.to_qkv(x.reshape(4 * n, -1, c))  # (4N, T, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (4N, h, T, e)

        # Attend by the cosine of rotated queries and keys.
        q = F.normalize(rotate_pairs(q, rotation), dim=-1)
        k = F.normalize(rotate_pairs(k, rotation), dim=-1)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # (h, 1, 1)
        weights = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # (4N, h, T, T)
        x = (weights.to(v.dtype) @ v).transpose(1, 2)  # (4N, T, h, e)

        # Put the sub-grids back.
        x = x.reshape(n, 2, 2, height // 2, width // 2, c)
        x = x.permute(0, 5, 3, 1, 4, 2)  # (N, C, H/2, 2, W/2, 2)
        return self.to_out(x.reshape(n, c, height, width))  # (N, C, H, W)


def rotary_table(grid: tuple[int, int], dim: int, like: Tensor) -> Tensor:
    """Build the unit complex numbers that turn channel pairs by position: (T, dim / 2).

    Pairs alternate between the column's and the row's angle. The i-th of dim / 4 frequencies is
    10000^(-4i/dim). Angles are computed in float64.
    """
    channels = torch.arange(0, dim, 4, dtype=torch.float64, device=like.device)  # (dim/4,)
    periods = 10000 ** (channels / dim)
    row = _positions(grid[0], like)[:, None] / periods  # (H/2, dim/4)
    column = _positions(grid[1], like)[:, None] / periods  # (W/2, dim/4)

    angles = torch.stack(torch.broadcast_tensors(column[None], row[:, None]), dim=-1)
    angles = angles.flatten(0, 1).flatten(1)  # (T, dim/2)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))


def _positions(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, dtype=torch.float64, device=like.device)


class RepFeedForward(nn.Module):
    """Re-parameterised FFN: pairs of 1x1 convolutions and parallel depthwise ones around a GELU.

    In eval mode, without gradients or a compiler, each group runs as the single convolution that it
    equals. The fused kernels are kept beside the parameters, not in the state dict. eval() computes
    them, train() drops them, and they are computed again if a parameter was replaced or written to.
    A write through `.data` only shows after the next eval().
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        half = hidden // 2
        self.project_in = nn.Sequential(Pointwise(dim, half), Pointwise(half, hidden))
        self.dwconv = nn.ModuleList(
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (5, 3, 1)
        )
        self.project_out = nn.Sequential(Pointwise(hidden, half), Pointwise(half, dim))
        self._fused: tuple[Tensor, ...] = ()
        self._fused_from: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return self._forward_fused(x)
        h = F.gelu(self.project_in(x))  # (N, rC, H, W)
        conv5, conv3, conv1 = self.dwconv
        return self.project_out(h + conv5(h) + conv3(h) + conv1(h))  # (N, C, H, W)

    def _forward_fused(self, x: Tensor) -> Tensor:
        if self._fused_from != self._versions():
            self._fuse()
        weight_in, bias_in, weight, bias, weight_out, bias_out = self._fused
        h = F.gelu(F.conv2d(x, weight_in, bias_in))  # (N, rC, H, W)
        h = F.conv2d(h, weight, bias, padding=2, groups=len(weight))
        return F.conv2d(h, weight_out, bias_out)  # (N, C, H, W)

    def train(self, mode: bool = True) -> RepFeedForward:
        super().train(mode)
        self._fused, self._fused_from = (), []
        if not mode:
            self._fuse()
        return self

    @torch.no_grad()
    def _fuse(self) -> None:
        """Compute the fused kernels in float64, which neither TF32 nor autocast rounds."""
        kernels = (
            *_fuse_pointwise(*self.project_in),
            *_fuse_depthwise(*self.dwconv),
            *_fuse_pointwise(*self.project_out),
        )
        dtype = next(self.parameters()).dtype
        self._fused = tuple(kernel.to(dtype) for kernel in kernels)
        self._fused_from = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """Identify the present values of the parameters: storage and number of writes."""
        return [(p.data_ptr(), p._version) for p in self.parameters()]


def _exact(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution in float64."""
    weight, bias = conv.parameters()
    return weight.double(), bias.double()


def _fuse_pointwise(first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """Write W2 (W1 x + b1) + b2 as one 1x1 convolution."""
    w1, b1 = _exact(first)
    w2, b2 = _exact(second)
    w1, w2 = w1.flatten(1), w2.flatten(1)
    return (w2 @ w1)[..., None, None], w2 @ b1 + b2


def _fuse_depthwise(conv5: nn.Module, conv3: nn.Module, conv1: nn.Module) -> tuple[Tensor, Tensor]:
    """Write the three convolutions and the identity beside them as one 5x5 convolution."""
    w5, b5 = _exact(conv5)
    w3, b3 = _exact(conv3)
    w1, b1 = _exact(conv1)
    points = F.pad(w1 + 1, (2, 2, 2, 2))
    return w5 + F.pad(w3, (1, 1, 1, 1)) + points, b5 + b3 + b1


class UDiTBlock(nn.Module):
    """Two rounds of attention and FFN, each modulated and gated by adaLN-Zero."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = LayerNorm2d()
        self.attn1 = DownsampledAttention(dim, heads)
        self.mlp1 = RepFeedForward(dim, mlp_ratio)
        self.attn2 = DownsampledAttention(dim, heads)
        self.mlp2 = RepFeedForward(dim, mlp_ratio)
        self.adaLN_modulation1 = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.adaLN_modulation2 = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor) -> Tensor:
        first = (self.adaLN_modulation1, self.attn1, self.mlp1)
        second = (self.adaLN_modulation2, self.attn2, self.mlp2)
        for adaln, attn, mlp in (first, second):
            modulation = adaln(c)[..., None, None].chunk(6, dim=1)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, C, 1, 1)
            h = attn(modulate(self.norm(x), shift1, scale1), rotation)  # (N, C, H, W)
            x = gated(x, gate1, h)
            h = mlp(modulate(self.norm(x), shift2, scale2))  # (N, C, H, W)
            x = gated(x, gate2, h)
        return x


class UDiT(nn.Module):
    """A U-shape of U-DiT blocks at three resolutions."""

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 96,
        depths: tuple[int, int, int, int, int] = (2, 5, 8, 5, 2),
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        if input_size % 8:
            raise ValueError(
                "U-DiT halves its input twice and splits that in sub-grids: input_size must be "
                f"divisible by 8, got {input_size}"
            )
        if dim % (4 * heads):
            raise ValueError(
                "U-DiT rotates channels of a head in fours: dim must be divisible by 4 heads, "
                f"got dim {dim}, heads {heads}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.heads = heads
        d1, d2, d3 = dim, 2 * dim, 4 * dim

        def stage(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(UDiTBlock(width, heads, mlp_ratio) for _ in range(depth))

        self.x_embedder = ConvStem(in_channels, d1)
        self.t_embedder_1 = TimestepEmbedder(d1)
        self.y_embedder_1 = LabelEmbedder(num_classes, d1)
        self.t_embedder_2 = TimestepEmbedder(d2)
        self.y_embedder_2 = LabelEmbedder(num_classes, d2)
        self.t_embedder_3 = TimestepEmbedder(d3)
        self.y_embedder_3 = LabelEmbedder(num_classes, d3)

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
        self.output = Conv3x3(d2, d2)
        self.final_layer = ConvFinal(d2, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        for block in self.modules():
            if isinstance(block, UDiTBlock):
                zero_(block.adaLN_modulation1, block.adaLN_modulation2)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.out_proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, 8, "U-DiT")
        c1 = self.t_embedder_1(t) + self.y_embedder_1(y)  # (N, D)
        c2 = self.t_embedder_2(t) + self.y_embedder_2(y)  # (N, 2D)
        c3 = self.t_embedder_3(t) + self.y_embedder_3(y)  # (N, 4D)

        # Encoder and middle.
        x1 = self._run(self.encoder_level_1, self.x_embedder(x), c1)  # (N, D, H, W)
        x2 = self._run(self.encoder_level_2, self.down1_2(x1), c2)  # (N, 2D, H/2, W/2)
        x3 = self._run(self.latent, self.down2_3(x2), c3)  # (N, 4D, H/4, W/4)

        # Decoder: join the encoder's output and reduce the channels.
        u2 = torch.cat([self.up3_2(x3), x2], dim=1)  # (N, 4D, H/2, W/2)
        u2 = self._run(self.decoder_level_2, self.reduce_chan_level2(u2), c2)  # (N, 2D, ...)
        u1 = torch.cat([self.up2_1(u2), x1], dim=1)  # (N, 2D, H, W)
        u1 = self._run(self.decoder_level_1, self.reduce_chan_level1(u1), c2)  # (N, 2D, H, W)
        return self.final_layer(self.output(u1), c2)  # (N, C_out, H, W)

    def _run(self, stage: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
        """Run a stage; positions are those within a sub-grid, the same for all its blocks."""
        grid = (x.shape[2] // 2, x.shape[3] // 2)
        rotation = rotary_table(grid, x.shape[1] // self.heads, like=x)  # (T, e / 2)
        return run_stage(stage, x, c, rotation)


register(
    UDiT,
    dict(
        udit_s=dict(dim=96, heads=4),
        udit_b=dict(dim=192, heads=8),
        udit_l=dict(dim=384, heads=16),
    ),
    tiny=dict(dim=16, depths=(1, 1, 1, 1, 1), heads=2),
    guided_channels=3,
    exceptions=Exceptions(
        sizes=(16, 24),  # at 8 a sub-grid of the middle is one token: attention learns nothing
        fuses="evaluation runs each group of convolutions as the one that it equals",
    ),
)
