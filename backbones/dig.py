"""DiG: Zhu et al., "Scalable and Efficient Diffusion Models with Gated Linear Attention", 2024.

Source: arXiv:2405.18428 and github.com/hustvl/DiG.

Tokens lie in the order in which the next block scans them: rows, rows backwards, columns, columns
backwards, rows and so on. The depthwise convolution sees the grid in that order too, turned or
transposed.

Legend: N batch, C channels, p patch, (H, W) grid of tokens, T = HW tokens, D width, h heads,
e = D / h, I inner width of the SwiGLU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import gated_linear
from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
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


class GatedLinearAttention(nn.Module):
    """Causal, with data-dependent decay of every key channel and a gated output."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(dim, dim // 2, bias=False)
        self.k_proj = Linear(dim, dim // 2, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.g_proj = Linear(dim, dim, bias=False)
        self.gk_proj = nn.Sequential(Linear(dim, 16, bias=False), Linear(16, dim // 2))
        self.g_norm_swish_gate = nn.RMSNorm(dim // heads, eps=1e-6)
        self.o_proj = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        decay = F.logsigmoid(self.gk_proj(x)) / 16  # (N, T, D/2)
        q = self._split(self.q_proj(x))  # (N, h, T, e/2)
        k = self._split(self.k_proj(x))  # (N, h, T, e/2)
        v = self._split(self.v_proj(x))  # (N, h, T, e)
        o = gated_linear(q, k, v, self._split(decay)).transpose(1, 2)  # (N, T, h, e)
        o = self.g_norm_swish_gate(o).flatten(2) * F.silu(self.g_proj(x))  # (N, T, D)
        return self.o_proj(o)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, h, T, e)


class SwiGlu(nn.Module):
    """Apply a gated MLP: down(SiLU(a) * b) with [a, b] = gate(x).

    I is 8/3 D, rounded up to a multiple of 256.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-int(dim * 4 * 2 / 3) // 256) * 256
        self.gate_proj = Linear(dim, 2 * hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate_proj(x).chunk(2, dim=-1)  # (N, T, I)
        return self.down_proj(F.silu(a) * b)


class DiGBlock(nn.Module):
    """Mixer and MLP, each modulated and gated by adaLN-Zero, then a depthwise convolution.

    The convolution has no residual connection.
    """

    def __init__(self, dim: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = GatedLinearAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = SwiGlu(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.dw_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))  # (N, T, D)
        x = gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)
        x = self.dw_conv(x.mT.unflatten(-1, self.grid))  # (N, D, H, W)
        return x.flatten(2).mT  # (N, T, D)


class DiG(nn.Module):
    """A stack of DiG blocks over patches; each block scans them in another direction."""

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
    ) -> None:
        super().__init__()
        if input_size % patch or dim % (2 * heads) or dim % 4:
            raise ValueError(
                "DiG needs input_size divisible by patch and dim by twice the heads and by 4, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}"
            )
        if depth % 4:
            raise ValueError(
                "DiG scans in four directions by turns and ends in the first: "
                f"depth must be divisible by 4, got {depth}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)

        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiGBlock(dim, heads, self.grid) for _ in range(depth))
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        for block in self.blocks:
            assert isinstance(block, DiGBlock)
            for layer in block.attn.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
            nn.init.dirac_(block.dw_conv.weight, groups=block.dw_conv.groups)
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)

    def is_in_rows(self, block: str) -> bool:
        """Return whether tokens that leave a part, such as 'blocks.4', are in the order of rows."""
        stack, _, index = block.partition(".")
        return stack != "blocks" or int(index) % 4 == 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "DiG")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for i, block in enumerate(self.blocks):
            x = block(x, c).flip(1)  # (N, T, D)
            if i % 2:  # from rows to columns or back
                x = x.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)


register(
    DiG,
    dict(
        dig_s_2=dict(depth=12, dim=384, heads=6),
        dig_b_2=dict(depth=12, dim=768, heads=12),
        dig_l_2=dict(depth=24, dim=1024, heads=16),
        dig_xl_2=dict(depth=28, dim=1152, heads=18),
    ),
    tiny=dict(depth=4, dim=24, heads=3),
    guided_channels=3,
    exceptions=Exceptions(frozen={"pos_embed": "positions are a fixed sine-cosine table"}),
)
