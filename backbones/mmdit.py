"""MMDiT: Esser et al., "Scaling Rectified Flow Transformers", 2024, as REPA builds it for MS-COCO.

Source: arXiv:2403.03206, arXiv:2410.06940 (appendix), and github.com/sihyun-yu/REPA at 67f7145.

Text and image are two streams with weights of their own, which meet in one attention. Heads have 32
channels, and the width is 32 times the depth. Nothing places the tokens of text, so their order
does not matter. The projector, which aligns hidden states in training, is left out.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 patches, L tokens of text, K their
width, D width, h heads, e = D / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.captions import Captions, Text, TextNetwork, Work
from backbones.kernels import attention
from backbones.layers import (
    Linear,
    Mlp,
    PatchEmbed,
    PatchFinal,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    unpatchify,
)
from backbones.positions import sincos_position
from backbones.registry import Exceptions, register

HEAD = 32  # channels of a head
TABLE = 16  # side of the grid whose positions are stored


class Projections(nn.Module):
    """The projections of one stream's attention; `closed` streams give no output."""

    def __init__(self, dim: int, closed: bool = False) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        if not closed:
            self.proj = Linear(dim, dim)


class Stream(nn.Module):
    """A stream's half of a joint block; a `last` one gives keys and values and ends there."""

    def __init__(self, dim: int, mlp_ratio: float, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.attn = Projections(dim, last)
        if not last:
            self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, (2 if last else 6) * dim))

    def enter(self, x: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Modulate and project; return (N, T, 3D) and what `leave` needs of the modulation."""
        shift, scale, *rest = self.adaLN_modulation(c)[:, None].chunk(2 if self.last else 6, -1)
        return self.attn.qkv(modulate(_norm(x), shift, scale)), tuple(rest)

    def leave(self, x: Tensor, mixed: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Add the attention's output, then the MLP: (N, T, D) -> same."""
        gate1, shift2, scale2, gate2 = rest  # (N, 1, D)
        x = gated(x, gate1, self.attn.proj(mixed))  # (N, T, D)
        return gated(x, gate2, self.mlp(modulate(_norm(x), shift2, scale2)))  # (N, T, D)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class JointAttention(nn.Module):
    """Attend over the tokens of both streams: (N, S, 3D) -> (N, S, D)."""

    def forward(self, qkv: Tensor) -> Tensor:
        parts = qkv.unflatten(2, (3, -1, HEAD))  # (N, S, 3, h, e)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # 3 x (N, h, S, e)
        return attention(q, k, v).transpose(1, 2).flatten(2)


class JointBlock(nn.Module):
    """Attend over text and image together; each stream has its own weights."""

    def __init__(self, dim: int, mlp_ratio: float, last: bool) -> None:
        super().__init__()
        self.joint = JointAttention()
        self.context_block = Stream(dim, mlp_ratio, last)
        self.x_block = Stream(dim, mlp_ratio)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        tokens = context.shape[1]
        text, of_text = self.context_block.enter(context, c)  # (N, L, 3D)
        image, of_image = self.x_block.enter(x, c)  # (N, T, 3D)
        mixed = self.joint(torch.cat([text, image], dim=1))  # (N, L + T, D)

        # The last block's text has no use any more.
        x = self.x_block.leave(x, mixed[:, tokens:], of_image)
        if not self.context_block.last:
            context = self.context_block.leave(context, mixed[:, :tokens], of_text)
        return context, x


class MMDiT(TextNetwork):
    """A stack of joint blocks of text and image."""

    pos_embed: Tensor  # of a grid of TABLE x TABLE: (1, TABLE^2, D)

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch: int = 2,
        depth: int = 24,
        mlp_ratio: float = 4.0,
        context_tokens: int = 77,
        context_dim: int = 768,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        if input_size % patch or not 0 < input_size // patch <= TABLE:
            raise ValueError(
                f"MMDiT takes up to {TABLE} x {TABLE} whole patches, "
                f"got input_size {input_size} and patch {patch}"
            )
        dim = HEAD * depth
        self.input_size = input_size
        self.in_channels = self.out_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.grid = (input_size // patch, input_size // patch)

        # Everything has torch's initial weights: the authors draw nothing anew.
        self.captions = Captions(num_classes, context_tokens, context_dim, vocabulary=vocabulary)
        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.context_embedder = Linear(context_dim, dim)
        self.register_buffer("pos_embed", sincos_position(dim, (TABLE, TABLE)))
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, mlp_ratio, last=i == depth - 1) for i in range(depth)
        )
        self.final_layer = PatchFinal(dim, patch, in_channels)

    def _positions(self) -> Tensor:
        """Return the positions of the centre of the stored grid: (1, T, D)."""
        side = self.grid[0]
        start = (TABLE - side) // 2
        inside = slice(start, start + side)
        table = self.pos_embed.unflatten(1, (TABLE, TABLE))  # (1, TABLE, TABLE, D)
        return table[:, inside, inside].flatten(1, 2)

    def text_work(self, text: Text) -> Work:
        return (self.context_embedder(text.context),)  # (N, L, D)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text) -> Tensor:
        check_grid(x, self.input_size, self.patch, "MMDiT")
        (context,) = self.read(y)  # (N, L, D)
        c = self.t_embedder(t)  # (N, D)
        x = self.x_embedder(x) + self._positions()  # (N, T, D)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        return unpatchify(self.final_layer(x, c), self.grid, self.patch)  # (N, C, H, W)


register(
    MMDiT,
    dict(mmdit_t2i=dict()),
    tiny=dict(depth=2, context_tokens=5, context_dim=10),
    exceptions=Exceptions(open_head="the authors keep torch's initial weights everywhere"),
)
