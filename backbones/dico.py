"""DiCo: Ai et al., "Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling", 2025.

Source: arXiv:2505.11196, section 3, and github.com/shallowdream204/DiCo at b596b05.

The full-resolution decoder and the head are 2D wide and conditioned by c2, as in the released code;
the paper does not say so.

Legend: N batch, C width of a stage (D, 2D, 4D), (H, W) grid of a stage, r FFN ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.kernels import (
    adaln2d,
    adaln_pointwise_gelu,
    depthwise_gelu,
    pointwise_gated,
    scale,
)
from backbones.layers import (
    ConvFinal,
    ConvStem,
    Downsample,
    GlobalPool,
    Linear,
    Pointwise,
    TimestepEmbedder,
    Upsample,
    check_grid,
    check_stages,
    gated,
    run_stage,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.registry import register


class DiCoBlock(nn.Module):
    """Conv module (equation 3) and feed-forward network, each modulated and gated by adaLN-Zero."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.conv1 = Pointwise(dim, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.ca = nn.Sequential(GlobalPool(), Pointwise(dim, dim), nn.Sigmoid())
        self.conv3 = Pointwise(dim, dim)
        self.conv4 = Pointwise(dim, hidden)
        self.conv5 = Pointwise(hidden, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[..., None, None].chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, C, 1, 1)
        x = gated(x, gate1, self.convolve(adaln2d(x, shift1, scale1)))  # (N, C, H, W)
        return self.feed_forward(x, shift2, scale2, gate2)  # (N, C, H, W)

    def convolve(self, x: Tensor) -> Tensor:
        """Apply 1x1, depthwise 3x3 with GELU, compact channel attention, 1x1."""
        h = depthwise_gelu(self.conv1(x), self.conv2.weight, self.conv2.bias)  # (N, C, H, W)
        return self.conv3(scale(h, self.ca(h)))  # (N, C, H, W)

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add two modulated and gated 1x1 convolutions around a GELU."""
        h = adaln_pointwise_gelu(x, shift, scale, self.conv4.weight, self.conv4.bias)
        return pointwise_gated(x, gate, h, self.conv5.weight, self.conv5.bias)  # (N, C, H, W)


class LabelEmbedders(nn.Module):
    """Look up the label in one table per resolution, kept under the authors' names."""

    def __init__(self, num_classes: int, dims: tuple[int, int, int]) -> None:
        super().__init__()
        self.embedding_table_0 = nn.Embedding(num_classes + 1, dims[0])
        self.embedding_table_1 = nn.Embedding(num_classes + 1, dims[1])
        self.embedding_table_2 = nn.Embedding(num_classes + 1, dims[2])

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding_table_0(y), self.embedding_table_1(y), self.embedding_table_2(y)


class DiCo(nn.Module):
    """A U-shape of DiCo blocks at three resolutions."""

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        dim: int = 128,
        depths: tuple[int, int, int, int, int] = (5, 4, 4, 4, 4),
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        if input_size % 4:
            raise ValueError(
                f"DiCo halves its input twice: input_size must be divisible by 4, got {input_size}"
            )
        check_stages(dim, 2, depths=depths)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        d1, d2, d3 = dim, 2 * dim, 4 * dim

        def stage(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(DiCoBlock(width, mlp_ratio) for _ in range(depth))

        self.x_embedder = ConvStem(in_channels, d1)
        self.t_embedder_1 = TimestepEmbedder(d1)
        self.y_embedder = LabelEmbedders(num_classes, (d1, d2, d3))
        self.t_embedder_2 = TimestepEmbedder(d2)
        self.t_embedder_3 = TimestepEmbedder(d3)

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

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_modulation(block for block in self.modules() if isinstance(block, DiCoBlock))
        zero_(self.final_layer.adaLN_modulation, self.final_layer.out_proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, 4, "DiCo")
        y1, y2, y3 = self.y_embedder(y)
        c1 = self.t_embedder_1(t) + y1  # (N, D)
        c2 = self.t_embedder_2(t) + y2  # (N, 2D)
        c3 = self.t_embedder_3(t) + y3  # (N, 4D)

        # Encoder and middle.
        x1 = run_stage(self.encoder_level_1, self.x_embedder(x), c1)  # (N, D, H, W)
        x2 = run_stage(self.encoder_level_2, self.down1_2(x1), c2)  # (N, 2D, H/2, W/2)
        x3 = run_stage(self.latent, self.down2_3(x2), c3)  # (N, 4D, H/4, W/4)

        # Decoder: join the encoder's output and reduce the channels.
        u2 = torch.cat([self.up3_2(x3), x2], dim=1)  # (N, 4D, H/2, W/2)
        u2 = run_stage(self.decoder_level_2, self.reduce_chan_level2(u2), c2)  # (N, 2D, ...)
        u1 = torch.cat([self.up2_1(u2), x1], dim=1)  # (N, 2D, H, W)
        u1 = run_stage(self.decoder_level_1, self.reduce_chan_level1(u1), c2)  # (N, 2D, H, W)
        return self.final_layer(u1, c2)  # (N, C_out, H, W)


register(
    DiCo,
    dict(
        dico_s=dict(dim=128, depths=(5, 4, 4, 4, 4), mlp_ratio=2.0),
        dico_b=dict(dim=256, depths=(5, 4, 4, 4, 4), mlp_ratio=2.0),
        dico_l=dict(dim=352, depths=(9, 8, 9, 8, 9), mlp_ratio=2.0),
        dico_xl=dict(dim=416, depths=(9, 9, 10, 9, 9), mlp_ratio=2.0),
        dico_h=dict(dim=416, depths=(14, 12, 10, 12, 14), mlp_ratio=4.0),
    ),
    tiny=dict(dim=12, depths=(2, 1, 1, 1, 1)),
    guided_channels=3,
    shared_names={
        r"^x_embedder": "stem",
        r"^t_embedder_1": "t_embedders.0",
        r"^t_embedder_2": "t_embedders.1",
        r"^t_embedder_3": "t_embedders.2",
        r"^y_embedder\.embedding_table_(\d)": r"y_embedders.\1.embedding_table",
        r"^(en|de)coder_level_": r"\1coder_",
        r"^latent": "middle",
        r"^down(\d)_\d": r"down_\1",
        r"^up\d_(\d)": r"up_\1",
        r"^reduce_chan_level": "reduce_",
        r"^final_layer": "final",
        r"\.conv1\.": ".mixer.pointwise_in.",
        r"\.conv2\.": ".mixer.depthwise.",
        r"\.ca\.1\.": ".mixer.channel.weight.",
        r"\.conv3\.": ".mixer.pointwise_out.",
        r"\.conv4\.": ".fc1.",
        r"\.conv5\.": ".fc2.",
    },
)
