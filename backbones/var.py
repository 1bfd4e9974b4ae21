"""VAR: Tian et al., NeurIPS 2024, "Visual autoregressive modeling".

Source: arXiv:2404.02905 and github.com/FoundationVision/VAR at 78b9539.

A transformer that predicts the next scale of an image, a map of tokens, from all coarser ones. Its
condition is the label alone. It is no function of (x, t, y), so it is registered as a kind of its
own: `forward(y, inputs)` gives the logits of all scales, and `step` those of the next ones.

Legend: N images, R rows (N, or 2N with null labels after the labels), S scales, T tokens of a
call, L tokens of all scales, C channels of a code, V codes, D width, h heads, e = D / h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.layers import Linear, Mlp, gated, modulate, zero_bias_
from backbones.registry import register

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
LARGEST_SCALE = math.log(100)  # of a head's logits, as a logarithm
NORM_EPS = 1e-6


class KeyValues:
    """The keys and values of all tokens so far, for every block."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_tokens(self) -> int:
        return self._pairs[0][0].shape[2] if self._pairs else 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, (R, h, T, e), and return all of a block."""
        if block in self._pairs:
            earlier_k, earlier_v = self._pairs[block]
            k = torch.cat([earlier_k, k], dim=2)
            v = torch.cat([earlier_v, v], dim=2)
        self._pairs[block] = (k, v)
        return k, v


class ScaleAttention(nn.Module):
    """Attend to the tokens of the own scale and of coarser ones: (R, T, D) -> (R, T, D).

    With `qk_norm`, queries and keys have length one and every head has a trained scale. Without it,
    the logits are a quarter of the usual ones.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qk_norm = qk_norm
        if qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KeyValues | None, block: int
    ) -> Tensor:
        n, t, d = x.shape
        bias = torch.cat([self.q_bias, self.get_buffer("zero_k_bias"), self.v_bias])
        qkv = kernels.linear(x, self.mat_qkv.weight, bias)  # (R, T, 3D)
        q, k, v = qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (R, h, T, e)

        # The kernel divides by the root of e.
        if self.qk_norm:
            scale = self.scale_mul_1H11.clamp(max=LARGEST_SCALE).exp()  # (1, h, 1, 1)
            q = F.normalize(q, dim=-1) * (scale * q.shape[-1] ** 0.5)
            k = F.normalize(k, dim=-1)
        else:
            q = q * 0.25

        if cache is not None:
            k, v = cache.extend(block, k, v)
        h = kernels.attention(q, k, v, mask)  # (R, h, T, e)
        return self.proj(h.transpose(1, 2).reshape(n, t, d))  # (R, T, D)


class VARBlock(nn.Module):
    """Attention and an MLP, modulated by the label.

    With a shared modulation, the block only adds six vectors of its own to it.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, shared: bool) -> None:
        super().__init__()
        self.attn = ScaleAttention(dim, heads, qk_norm)
        self.ffn = Mlp(dim, 4 * dim, "tanh")
        if shared:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, dim))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def modulation(self, c: Tensor) -> Sequence[Tensor]:
        """Return two gates, two scales and two shifts, (R, 1, D), from the condition.

        The condition is the label's row (R, D), or the network's shared modulation (R, 1, 6, D).
        """
        if c.dim() == 2:
            return self.ada_lin(c)[:, None].chunk(6, dim=-1)
        return (self.ada_gss + c).unbind(2)

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor | None, cache: KeyValues | None, index: int
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(c)
        h = modulate(normalise(x), shift1, scale1)  # (R, T, D)
        x = gated(x, gate1, self.attn(h, mask, cache, index))  # (R, T, D)
        h = modulate(normalise(x), shift2, scale2)  # (R, T, D)
        return gated(x, gate2, self.ffn(h))  # (R, T, D)


class HeadNorm(nn.Module):
    """Normalise tokens for the head, scale before shift: (R, T, D), (R, D) -> (R, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.ada_lin(c)[:, None].chunk(2, dim=-1)  # (R, 1, D)
        return modulate(normalise(x), shift, scale)


class VAR(nn.Module):
    """A stack of blocks over the tokens of all scales.

    `sides` are the heights of the token maps, from coarse to fine. `shared_adaln` computes one
    modulation for all blocks. `gate_init` scales the initial weights of the gates.
    """

    def __init__(
        self,
        *,
        sides: tuple[int, ...] = SIDES_256,
        vocabulary: int = 4096,
        channels: int = 32,
        num_classes: int = 1000,
        depth: int = 16,
        dim: int = 1024,
        heads: int = 16,
        shared_adaln: bool = False,
        qk_norm: bool = True,
        gate_init: float = 1e-3,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"VAR needs dim divisible by heads, got dim {dim}, heads {heads}")
        self.sides = check_sides(sides, "VAR")
        self.vocabulary = vocabulary
        self.channels = channels
        self.num_classes = num_classes
        self.dim = dim
        self.lengths = [side**2 for side in self.sides]
        length = sum(self.lengths)

        # The first scale starts from the label, the others from what was drawn before them.
        self.word_embed = Linear(channels, dim)
        self.class_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.lengths[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, dim))
        self.lvl_embed = nn.Embedding(len(self.sides), dim)

        self.shared_adaln = shared_adaln
        if shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            VARBlock(dim, heads, qk_norm=qk_norm, shared=shared_adaln) for _ in range(depth)
        )
        self.head_nm = HeadNorm(dim)
        self.head = Linear(dim, vocabulary)

        # The scale of every token, and minus infinity where a token must not look: at finer ones.
        levels = [[scale] * length for scale, length in enumerate(self.lengths)]
        scales = torch.tensor(sum(levels, []))  # (L,)
        hidden = scales[None, :] > scales[:, None]  # (L, L)
        mask = torch.zeros(length, length).masked_fill(hidden, -torch.inf)
        self.register_buffer("lvl_1L", scales[None])
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self._init_weights(gate_init)

    def _init_weights(self, gate_init: float) -> None:
        """Draw normal weights; the gates start near zero, and not at it."""
        std = (3 * self.dim) ** -0.5
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.pos_1LC, std=std)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(layer.weight, std=std)
            if isinstance(layer, nn.Linear):
                zero_bias_(layer)

        # Heads, the ends of residual branches and modulations are then made smaller.
        with torch.no_grad():
            self.head.weight *= 0.02
            self.head_nm.get_parameter("ada_lin.1.weight").mul_(0.5)
            for block in self.blocks:
                shrink_block(block, len(self.blocks), gate_init)

    def forward(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Return the logits of all tokens, given what the coarser scales of an image make.

        Args:
            y: labels (N,); num_classes is the null label.
            inputs: of the second scale to the last, (N, L - l_1, C), from the tokenizer.

        Returns:
            Logits (N, L, V); those of a scale are computed from the inputs of that scale.

        Raises:
            ValueError: inputs of another shape.
        """
        expected = (len(y), sum(self.lengths[1:]), self.channels)
        if tuple(inputs.shape) != expected:
            raise ValueError(
                f"this VAR takes inputs of {expected} for scales of {self.sides}, got "
                f"{tuple(inputs.shape)}"
            )
        return self.step(self.embed(y, inputs), y)

    def embed(self, y: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """Embed inputs of consecutive scales: (R,), (N, T, C) -> (R, T, D).

        The rows of `y` are one or several conditions for the same images, one block of rows for
        each condition.

        Args:
            first: position of the first token. From position zero on, the tokens of the first
                scale, which have no inputs, come before the others.
        """
        x = self.word_embed(inputs).repeat(len(y) // len(inputs), 1, 1)  # (R, T, D)
        if first == 0:
            start = self.class_emb(y)[:, None] + self.pos_start  # (R, l_1, D)
            x = torch.cat([start, x], dim=1)
        last = first + x.shape[1]
        levels = self.lvl_embed(self.get_buffer("lvl_1L")[:, first:last])  # (1, T, D)
        return x + (levels + self.pos_1LC[:, first:last])

    def step(self, x: Tensor, y: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Return the logits of the next tokens, (R, T, V), at least in float32.

        Args:
            x: embedded tokens (R, T, D) of one scale or of several.
            y: labels (R,).
            cache: keys and values of all earlier tokens; those of `x` join them.
        """
        first = cache.num_tokens if cache is not None else 0
        mask = self._mask(first, first + x.shape[1])
        label = self.class_emb(y)  # (R, D)
        c = label
        if self.shared_adaln:
            c = self.shared_ada_lin(label).view(len(y), 1, 6, -1)  # (R, 1, 6, D)

        for index, block in enumerate(self.blocks):
            x = block(x, c, mask, cache, index)  # (R, T, D)
        logits = self.head(self.head_nm(x, label))  # (R, T, V)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def new_cache(self) -> KeyValues:
        """Return a cache for `step`, before the first token."""
        return KeyValues()

    def _mask(self, first: int, last: int) -> Tensor | None:
        """Return what to add to the logits of attention; None for one scale, which sees all."""
        start = 0
        for length in self.lengths:
            if (start, start + length) == (first, last):
                return None
            start += length
        return self.get_buffer("attn_bias_for_masking")[:, :, first:last, :last]


def normalise(x: Tensor) -> Tensor:
    """Normalise each token without parameters: (R, T, D) -> (R, T, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def shrink_block(block: nn.Module, depth: int, gate_init: float) -> None:
    """Scale a block's initial weights down, without gradients."""
    for name in ("attn.proj", "ffn.fc2"):
        block.get_parameter(f"{name}.weight").div_((2 * depth) ** 0.5)

    # The first two of six parts are gates.
    if hasattr(block, "ada_gss"):
        shared = block.get_parameter("ada_gss")
        nn.init.normal_(shared, std=shared.shape[-1] ** -0.5)
        parts = shared[0, 0]  # (6, D)
    else:
        weight = block.get_parameter("ada_lin.1.weight")
        parts = weight.view(6, -1, weight.shape[1])  # (6, D, D)
    parts[:2] *= gate_init
    parts[2:] *= 0.5


def check_sides(sides: Sequence[int], family: str) -> tuple[int, ...]:
    """Return the sides of token maps.

    Raises:
        ValueError: unless they begin with 1 and rise.
    """
    sides = tuple(sides)
    rising = all(low < high for low, high in zip(sides, sides[1:], strict=False))
    if not sides or sides[0] != 1 or not rising:
        raise ValueError(f"{family} takes sides that begin with 1 and rise, got {sides}")
    return sides


register(
    VAR,
    dict(
        var_d16=dict(depth=16, dim=1024, heads=16),
        var_d20=dict(depth=20, dim=1280, heads=20),
        var_d24=dict(depth=24, dim=1536, heads=24, gate_init=1e-4),
        var_d30=dict(depth=30, dim=1920, heads=30, gate_init=1e-5),
        var_d36_s=dict(
            sides=SIDES_512, depth=36, dim=2304, heads=36, shared_adaln=True, gate_init=5e-6
        ),
    ),
    tiny=dict(sides=(1, 2, 3), vocabulary=40, channels=6, depth=2, dim=24, heads=3),
    kind="autoregressive",
)
