"""DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.

Legend: N batch, T tokens, D width, h heads, e = D / h, p patch, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from backbones.kernels import adaln, attention
from backbones.layers import (
    LabelEmbedder,
    Linear,
    Mlp,
    PatchEmbed,
    PatchFinal,
    TimestepEmbedder,
    check_grid,
    gated,
    sincos_position,
    unpatchify,
    xavier_flat_,
    xavier_init,
    zero_,
)
from backbones.registry import register


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # 3 x (N, h, T, e)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(n, t, d))  # (N, T, D)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by adaLN-Zero."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(
            6, dim=-1
        )  # (N, 1, D)
        x = gated(x, gate1, self.attn(adaln(x, shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(adaln(x, shift2, scale2)))  # (N, T, D)


class DiT(nn.Module):
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
    ) -> None:
        super().__init__()
        if input_size % patch or dim % heads or dim % 4:
            raise ValueError(
                f"DiT needs input_size divisible by patch and dim by heads and by 4, got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}"
            )
        self.input_size, self.in_channels, self.num_classes, self.patch = (
            input_size,
            in_channels,
            num_classes,
            patch,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid = (input_size // patch, input_size // patch)
        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_(*(block.adaLN_modulation[1] for block in self.blocks))
        zero_(self.final_layer.adaLN_modulation[1], self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "DiT")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)


_WIDTHS = {
    "s": dict(depth=12, dim=384, heads=6),
    "b": dict(depth=12, dim=768, heads=12),
    "l": dict(depth=24, dim=1024, heads=16),
    "xl": dict(depth=28, dim=1152, heads=16),
}

register(
    DiT,
    {
        f"dit_{size}_{patch}": options | dict(patch=patch)
        for size, options in _WIDTHS.items()
        for patch in (2, 4, 8)
    },
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
)
