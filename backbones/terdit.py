"""TerDiT: Lu et al., "TerDiT: Ternary Diffusion Models with Transformers", 2024.

Source: arXiv:2405.14854 and github.com/Lucky-Lance/TerDiT at 825f1f2. The network is Large-DiT's,
a DiT with LLaMA's blocks; `ternary=False` is that network.

All linear layers of the blocks multiply by -1, 0 and 1 times one number, and so does the adaLN
modulation, whose outputs a norm then brings back to size. Activations are not quantised, so the
network computes as many multiply-accumulates as with full precision. What shrinks is the stored
form, `packed=True`, with four weights in a byte.

Tokens come in row-major order and turn by their place in it; nothing else tells their positions.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 tokens, D width, E = min(D, 1024)
width of the condition, h heads, e = D / h.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchFinal,
    RMSNorm,
    SwiGlu,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    unpatchify,
    xavier_init,
    zero_,
)
from backbones.registry import register
from backbones.rotary import rotate_pairs, sequence_rotation
from backbones.ternary import PackedLinear, TernaryLinear, list_ternary, pack_weights

MakeLinear = Callable[..., nn.Module]
ALPHAS = ("normal", "absmean")


class RotaryAttention(nn.Module):
    """Attend among all tokens, which turn by their place: (N, T, D), (T, e/2) -> (N, T, D).

    The optional norms of queries and keys are over the whole width, before heads are split.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, linear: MakeLinear) -> None:
        super().__init__()
        self.heads = heads
        self.wq = linear(dim, dim)
        self.wk = linear(dim, dim)
        self.wv = linear(dim, dim)
        self.wo = linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q = rotate_pairs(self._split(self.q_norm(self.wq(x))), rotation)  # (N, h, T, e)
        k = rotate_pairs(self._split(self.k_norm(self.wk(x))), rotation)  # (N, h, T, e)
        h = kernels.attention(q, k, self._split(self.wv(x)))  # (N, h, T, e)
        return self.wo(h.transpose(1, 2).flatten(2))  # (N, T, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, h, T, e)


class TerDiTBlock(nn.Module):
    """Attention and gated MLP, modulated and gated by adaLN whose six parts share one norm."""

    def __init__(
        self, dim: int, c_dim: int, heads: int, *, qk_norm: bool, linear: MakeLinear
    ) -> None:
        super().__init__()
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.attention = RotaryAttention(dim, heads, qk_norm, linear)
        self.feed_forward = SwiGlu(dim, hidden, linear)
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.ffn_norm = RMSNorm(dim, eps=1e-5)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), linear(c_dim, 6 * dim, bias=True), RMSNorm(6 * dim, eps=1e-5)
        )

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D)
        h = modulate(self.attention_norm(x), shift1, scale1)  # (N, T, D)
        x = gated(x, gate1, self.attention(h, rotation))  # (N, T, D)
        h = modulate(self.ffn_norm(x), shift2, scale2)  # (N, T, D)
        return gated(x, gate2, self.feed_forward(h))  # (N, T, D)


class TerDiT(nn.Module):
    """A stack of TerDiT blocks over patches.

    `ternary=False` is the control of the ternary network: it has full-precision layers and is equal
    in all else. `packed=True` is the stored form, without gradients of its ternary weights. `alpha`
    is where a ternary layer's number starts: "normal", as released, or "absmean", the mean size of
    the layer's weights.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        patch: int = 2,
        dim: int = 1536,
        depth: int = 16,
        heads: int = 32,
        qk_norm: bool = False,
        ternary: bool = True,
        alpha: str = "normal",
        packed: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % (2 * heads) or dim % 4:
            raise ValueError(
                "TerDiT needs input_size divisible by patch and dim by twice the heads and by 4, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}"
            )
        if alpha not in ALPHAS:
            raise ValueError(f"unknown alpha {alpha!r}; known: {', '.join(ALPHAS)}")
        if packed and not ternary:
            raise ValueError("packed=True stores ternary weights; build it with ternary=True")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.head_dim = dim // heads
        self.packed = packed
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)

        # The condition is at most 1024 wide.
        c_dim = min(dim, 1024)
        linear: MakeLinear = partial(Linear, bias=False)
        if ternary:
            linear = PackedLinear if packed else TernaryLinear
        self.x_embedder = Linear(in_channels * patch**2, dim)
        self.t_embedder = TimestepEmbedder(c_dim)
        self.y_embedder = LabelEmbedder(num_classes, c_dim)
        self.layers = nn.ModuleList(
            TerDiTBlock(dim, c_dim, heads, qk_norm=qk_norm, linear=linear) for _ in range(depth)
        )
        self.final_layer = PatchFinal(dim, patch, self.out_channels, c_dim=c_dim)
        self._init_weights(alpha)

    def _init_weights(self, alpha: str) -> None:
        """Draw DiT's initial weights, then the alphas; adaLN's own norm keeps its weight of 1."""
        xavier_init(self)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)
        if self.packed:
            return
        for block in self.layers:
            modulation = block.get_submodule("adaLN_modulation.1")
            assert isinstance(modulation, nn.Linear)
            nn.init.zeros_(modulation.weight)
        for layer in self.modules():
            if isinstance(layer, TernaryLinear):
                layer.init_alpha(alpha)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "TerDiT")
        x = self.x_embedder(self._patchify(x))  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, E)
        rotation = sequence_rotation(x.shape[1], self.head_dim, x.device)  # (T, e/2)
        for block in self.layers:
            x = block(x, c, rotation)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)

    def _patchify(self, x: Tensor) -> Tensor:
        """Cut images into tokens in the order of channel, row and column, unlike `unpatchify`."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT  # (N, T, C*p*p)

    def from_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pack full-precision weights for a packed network, and refuse packed ones for another.

        Raises:
            ValueError: For packed weights where none are meant, and for another packing.
        """
        if self.packed:
            return pack_weights(weights)
        stored = [name for name in list_ternary(weights) if not weights[name].is_floating_point()]
        if stored:
            raise ValueError(
                f"{stored[0]} and {len(stored) - 1} other weights are packed, without the numbers "
                "that were rounded; build the network with packed=True"
            )
        return weights


register(
    TerDiT,
    dict(
        terdit_600m=dict(dim=1536, depth=16, heads=32),
        terdit_4_2b=dict(dim=3072, depth=32, heads=32),  # the authors' constructor says 3B
    ),
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
)
