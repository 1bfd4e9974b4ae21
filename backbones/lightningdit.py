"""LightningDiT: Yao et al., "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
Diffusion Models", CVPR 2025.

Source: arXiv:2501.01423 and github.com/hustvl/LightningDiT at 2725fed.

DiT with rotary positions, RMSNorm and SwiGLU, which predicts a velocity. Time runs from noise at 0
to data at 1 and is embedded as it is. DiT's fixed position table stays beside the rotary ones.
Latents have 32 channels at 1/16 of the image's side; guidance changes the first three channels.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 tokens, D width, h heads,
e = D / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.layers import (
    LabelEmbedder,
    Linear,
    Mlp,
    PatchEmbed,
    PatchFinal,
    RMSNorm,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    unpatchify,
    xavier_flat_,
    xavier_init,
    zero_,
    zero_modulation,
)
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register


class RotaryPosition(nn.Module):
    """Turn neighbouring channels by the token's place: (N, h, T, e) -> (N, h, T, e).

    The first half of the channels turns by the row and the second by the column, both counted from
    0. The j-th pair of a half has the frequency 10000^(-4j/e).
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        pairs = torch.arange(head_dim // 4, dtype=torch.float64)
        frequencies = (10000.0 ** (-4 * pairs / head_dim)).repeat_interleave(2)  # (e/2,)
        row = torch.arange(grid[0], dtype=torch.float64)[:, None, None] * frequencies
        column = torch.arange(grid[1], dtype=torch.float64)[None, :, None] * frequencies
        angles = torch.cat(torch.broadcast_tensors(row, column), dim=-1).flatten(0, 1)  # (T, e)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (N, h, T, e/2)
        turned = torch.stack([-b, a], dim=-1).flatten(-2)  # (N, h, T, e)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attend among all tokens, with queries and keys that may be normalised and turned."""

    def __init__(self, dim: int, heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = norm(dim // heads)
        self.k_norm = norm(dim // heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rope: nn.Module) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, h, e)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, h, T, e)
        h = kernels.attention(rope(self.q_norm(q)), rope(self.k_norm(k)), v)  # (N, h, T, e)
        return self.proj(h.transpose(1, 2).flatten(2))  # (N, T, D)


class SwiGluMlp(nn.Module):
    """Apply a gated MLP, w3(SiLU(u) * v) with [u, v] = w12(x): (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.w12(x).chunk(2, dim=-1)  # (N, T, hidden)
        return self.w3(F.silu(u) * v)


class LightningDiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by adaLN-Zero, with or without shifts."""

    def __init__(
        self, dim: int, heads: int, *, swiglu: bool, rms: bool, qk_norm: bool, no_shift: bool
    ) -> None:
        super().__init__()
        self.norm1 = token_norm(dim, rms)
        self.norm2 = token_norm(dim, rms)
        head_norm: type[nn.Module] = nn.Identity
        if qk_norm:
            head_norm = RMSNorm if rms else nn.LayerNorm
        self.attn = RotaryAttention(dim, heads, head_norm)

        # Two thirds of the width make a gated MLP as large as a plain one.
        hidden = 4 * dim
        self.mlp = SwiGluMlp(dim, int(2 / 3 * hidden)) if swiglu else Mlp(dim, hidden, "tanh")
        self.parts = 4 if no_shift else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, self.parts * dim))

    def forward(self, x: Tensor, c: Tensor, rope: nn.Module) -> Tensor:
        parts = self.adaLN_modulation(c)[:, None].chunk(self.parts, dim=-1)  # (N, 1, D)
        if self.parts == 4:
            scale1, gate1, scale2, gate2 = parts
            x = gated(x, gate1, self.attn(self.norm1(x) * (1 + scale1), rope))  # (N, T, D)
            return gated(x, gate2, self.mlp(self.norm2(x) * (1 + scale2)))  # (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)


def token_norm(dim: int, rms: bool) -> nn.Module:
    """Build the norm of tokens: RMSNorm with a weight, or DiT's LayerNorm without parameters."""
    return RMSNorm(dim) if rms else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class LightningDiT(nn.Module):
    """A stack of LightningDiT blocks over patches; `learn_sigma` adds channels that are dropped."""

    def __init__(
        self,
        *,
        input_size: int = 16,
        in_channels: int = 32,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        patch: int = 1,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        swiglu: bool = True,
        rope: bool = True,
        rms: bool = True,
        qk_norm: bool = False,
        no_shift: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % (4 * heads if rope else heads) or dim % 4:
            raise ValueError(
                "LightningDiT needs input_size divisible by patch and dim by heads and by 4, with "
                f"rope dim by 4 heads, got input_size {input_size}, patch {patch}, dim {dim}, "
                f"heads {heads}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = in_channels
        self.grid = (input_size // patch, input_size // patch)

        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.feat_rope = RotaryPosition(dim // heads, self.grid) if rope else nn.Identity()
        self.blocks = nn.ModuleList(
            LightningDiTBlock(
                dim, heads, swiglu=swiglu, rms=rms, qk_norm=qk_norm, no_shift=no_shift
            )
            for _ in range(depth)
        )
        head_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = PatchFinal(dim, patch, head_channels, token_norm(dim, rms))
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "LightningDiT")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C or p*p*2C)
        return unpatchify(x, self.grid, self.patch)[:, : self.out_channels]  # (N, C, H, W)


B = dict(depth=12, dim=768, heads=12)
L = dict(depth=24, dim=1024, heads=16)
XL = dict(depth=28, dim=1152, heads=16)

register(
    LightningDiT,
    dict(
        lightningdit_b_1=B | dict(patch=1),
        lightningdit_b_2=B | dict(patch=2),
        lightningdit_l_2=L | dict(patch=2),
        lightningdit_xl_1=XL | dict(patch=1),
        lightningdit_xl_2=XL | dict(patch=2),
        lightningdit_1p0b_1=dict(depth=24, dim=1536, heads=24, patch=1),
        lightningdit_1p6b_1=dict(depth=28, dim=1792, heads=28, patch=1),
    ),
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
    exceptions=Exceptions(
        frozen={"pos_embed": "positions are a fixed sine-cosine table"},
        drops_variance="a velocity has no variance; the wider head's second half is dropped",
    ),
)
