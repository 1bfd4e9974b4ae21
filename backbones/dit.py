"""DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.

Source: arXiv:2212.09748 and github.com/facebookresearch/DiT at ed81ce2.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import adaln
from backbones.layers import (
    LabelEmbedder,
    Linear,
    Mlp,
    PatchEmbed,
    PatchFinal,
    SelfAttention,
    TimestepEmbedder,
    check_grid,
    gated,
    unpatchify,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register

EPS = 1e-6  # of all norms


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by adaLN-Zero."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, mlp_norm_eps: float) -> None:
        super().__init__()
        self.mlp_norm_eps = mlp_norm_eps
        self.attn = SelfAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D)
        x = gated(x, gate1, self.attn(adaln(x, shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(self._modulate(x, shift2, scale2)))  # (N, T, D)

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if self.mlp_norm_eps == EPS:
            return adaln(x, shift, scale)
        return F.layer_norm(x, x.shape[-1:], eps=self.mlp_norm_eps) * (1 + scale) + shift


class DiT(nn.Module):
    """A stack of DiT blocks over patches, with fixed positions.

    `time_divisor` and `mlp_norm_eps` are 127 and 1e-5 for weights that were trained in the
    diffusers library; see diffusers_format.py.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        patch: int = 2,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        time_divisor: int = 128,
        mlp_norm_eps: float = EPS,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % heads or dim % 4:
            raise ValueError(
                "DiT needs input_size divisible by patch and dim by heads and by 4, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.dim = dim
        self.heads = heads
        self.time_divisor = time_divisor
        self.mlp_norm_eps = mlp_norm_eps
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)

        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim, divisor=time_divisor)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, heads, mlp_ratio, mlp_norm_eps) for _ in range(depth)
        )
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "DiT")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)


WIDTHS = {
    "s": dict(depth=12, dim=384, heads=6),
    "b": dict(depth=12, dim=768, heads=12),
    "l": dict(depth=24, dim=1024, heads=16),
    "xl": dict(depth=28, dim=1152, heads=16),
}

register(
    DiT,
    dict(
        dit_s_2=WIDTHS["s"] | dict(patch=2),
        dit_s_4=WIDTHS["s"] | dict(patch=4),
        dit_s_8=WIDTHS["s"] | dict(patch=8),
        dit_b_2=WIDTHS["b"] | dict(patch=2),
        dit_b_4=WIDTHS["b"] | dict(patch=4),
        dit_b_8=WIDTHS["b"] | dict(patch=8),
        dit_l_2=WIDTHS["l"] | dict(patch=2),
        dit_l_4=WIDTHS["l"] | dict(patch=4),
        dit_l_8=WIDTHS["l"] | dict(patch=8),
        dit_xl_2=WIDTHS["xl"] | dict(patch=2),
        dit_xl_4=WIDTHS["xl"] | dict(patch=4),
        dit_xl_8=WIDTHS["xl"] | dict(patch=8),
    ),
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
    exceptions=Exceptions(frozen={"pos_embed": "positions are a fixed sine-cosine table"}),
    shared_names={
        r"^pos_embed": "position",
        r"\.attn\.": ".mixer.",
        r"\.mlp\.fc": ".fc",
        r"^final_layer": "final",
    },
)
