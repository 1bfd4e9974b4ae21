"""DyDiT: Zhao et al., "Dynamic Diffusion Transformer", ICLR 2025.

Source: arXiv:2410.03456 and github.com/alibaba-damo-academy/DyDiT at 0ddc509.

DiT whose blocks spend less where routers switch parts off. Heads and groups of hidden channels are
switched by time, and tokens by what they hold after attention. A network fresh from a DiT
checkpoint has all gates on and computes DiT's output, bit for bit.

Three paths compute the same function:

- `forward` multiplies by gates of 0 and 1, as the authors' public code does. It costs as much as
  DiT, and the routers besides. Its gradient passes straight through the gates.
- `forward_gathered` computes only what is on. Its batch shares one time.
- `forward_complete` leaves the gates out: it is DiT.

`forward_with_gates` also takes noise for the gates, which a trainer draws, and returns the gates.

Legend: N batch, C channels, (H, W) input, p patch, T = HW / p^2 tokens, D width, L blocks,
h heads and groups of hidden channels, R rows that are on among N T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.dit import WIDTHS
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
from backbones.routers import Gates, TokenRouter, WidthRouter, used_share

# Names of the parameters that DiT lacks.
ROUTERS = (".attn_rate.", ".mlp_rate.", ".token_selection.")
# The authors' biases of routers: sigmoid(15) and sigmoid(35) are one, so gates start on.
WIDTH_BIAS = 15.0
TOKEN_BIAS = 35.0

# Gated layers


class GatedAttention(SelfAttention):
    """Attention of which heads are on: (N, T, D), (N, h) -> (N, T, D)."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return super().forward(x)
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, -1)  # (N, T, 3, h, e)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, h, T, e)
        h = kernels.attention(q, k, v) * gate[:, :, None, None]  # (N, h, T, e)
        return self.proj(h.transpose(1, 2).reshape(n, t, d))  # (N, T, D)

    def gather(self, x: Tensor, gate: Tensor) -> Tensor:
        """Attend by the heads that are on for the whole batch: (N, T, D), (h,) -> (N, T, D)."""
        n, t, d = x.shape
        on = gate.nonzero()[:, 0]  # (k,)
        weight, bias = (
            self.qkv.weight.view(3, self.heads, -1, d),
            self.qkv.bias.view(3, self.heads, -1),
        )
        rows = weight[:, on].flatten(0, 2), bias[:, on].flatten()
        qkv = kernels.linear(x, *rows).view(n, t, 3, len(on), -1)  # (N, T, 3, k, e)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, k, T, e)
        h = kernels.attention(q, k, v).transpose(1, 2).flatten(2)  # (N, T, k e)
        columns = self.proj.weight.view(d, self.heads, -1)[:, on].flatten(1)  # (D, k e)
        return kernels.linear(h, columns, self.proj.bias)  # (N, T, D)


class GatedMlp(Mlp):
    """MLP of whose hidden channels groups are on: (N, T, D), (N, h) -> (N, T, D)."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return super().forward(x)
        h = self.fc1(x).unflatten(-1, (gate.shape[1], -1))  # (N, T, h, 4D/h)
        h = (h * gate[:, None, :, None]).flatten(2)  # (N, T, 4D)
        return self.fc2(F.gelu(h, approximate=self.approximate))

    def gather(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute the groups that are on for all rows: (R, D), (h,) -> (R, D)."""
        on = gate.nonzero()[:, 0]  # (k,)
        shape = (len(gate), -1)
        rows = self.fc1.weight.unflatten(0, shape)[on].flatten(0, 1)  # (k 4D/h, D)
        bias = self.fc1.bias.unflatten(0, shape)[on].flatten()  # (k 4D/h,)
        columns = self.fc2.weight.unflatten(1, shape)[:, on].flatten(1)  # (D, k 4D/h)
        h = F.gelu(kernels.linear(x, rows, bias), approximate=self.approximate)
        return kernels.linear(h, columns, self.fc2.bias)  # (R, D)


class DyDiTBlock(nn.Module):
    """A DiT block of which heads, hidden channels and tokens can be off."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = GatedAttention(dim, heads)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.attn_rate = WidthRouter(dim, heads)
        self.mlp_rate = WidthRouter(dim, heads)
        self.token_selection = TokenRouter(dim)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention, then of the MLP; each (N, 1, D)."""
        return self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)

    def forward(
        self, x: Tensor, c: Tensor, time: Tensor, noise: Gates | None
    ) -> tuple[Tensor, Gates]:
        """Multiply by the gates, and return the output and the gates.

        Args:
            x: (N, T, D)
            c: (N, D), of time and label
            time: (N, D), of time alone
            noise: Of this block, or None.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        heads = self.attn_rate(time, noise.heads if noise else None)  # (N, h)
        x = gated(x, gate1, self.attn(adaln(x, shift1, scale1), heads))  # (N, T, D)

        # An unselected token gets nothing of the MLP, its last bias included.
        tokens = self.token_selection(x, noise.tokens if noise else None)  # (N, T)
        groups = self.mlp_rate(time, noise.groups if noise else None)  # (N, h)
        branch = self.mlp(adaln(x, shift2, scale2), groups)  # (N, T, D)
        return gated(x, tokens[..., None] * gate2, branch), Gates(heads, groups, tokens)

    def forward_complete(self, x: Tensor, c: Tensor) -> Tensor:
        """Compute DiT's block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = gated(x, gate1, self.attn(adaln(x, shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(adaln(x, shift2, scale2)))  # (N, T, D)

    def forward_gathered(self, x: Tensor, c: Tensor, time: Tensor) -> Tensor:
        """Compute what is on, for images of one time: (N, T, D), (N, D), (N, D) -> (N, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        heads = self.attn_rate(time[:1], None)[0]  # (h,)
        x = gated(x, gate1, self.attn.gather(adaln(x, shift1, scale1), heads))  # (N, T, D)

        # Rows are tokens of any image; each has the modulation of its image.
        n, t, d = x.shape
        on = self.token_selection(x, None).flatten().nonzero()[:, 0]  # (R,)
        image = on.div(t, rounding_mode="floor")  # (R,)
        rows = x.flatten(0, 1)  # (N T, D)
        groups = self.mlp_rate(time[:1], None)[0]  # (h,)
        h = adaln(rows[on, None], shift2[image], scale2[image])[:, 0]  # (R, D)
        branch = gate2[image, 0] * self.mlp.gather(h, groups)  # (R, D)
        return rows.index_add(0, on, branch.to(rows.dtype)).view(n, t, d)


class DyDiT(nn.Module):
    """A stack of DyDiT blocks over patches, with fixed positions.

    With `gathered`, `forward` takes the gathered path in evaluation mode.
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
        gathered: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if input_size % patch or dim % heads or dim % 4 or hidden % heads or heads < 2 or dim < 16:
            raise ValueError(
                "DyDiT needs input_size divisible by patch, dim by heads and by 4, hidden channels "
                "by heads, at least 2 heads and a dim of at least 16, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, heads {heads}, "
                f"mlp_ratio {mlp_ratio}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.gathered = gathered
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)
        self.dim = dim
        self.heads = heads
        self.hidden = hidden

        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DyDiTBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_init(self)
        xavier_flat_(self.x_embedder.proj)
        zero_modulation(self.blocks)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)
        for module in self.modules():
            if isinstance(module, WidthRouter):
                nn.init.constant_(module.router.bias, WIDTH_BIAS)
            elif isinstance(module, TokenRouter):
                nn.init.constant_(module.get_parameter("mlp_head.2.bias"), TOKEN_BIAS)

    # Weights

    def from_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refuse the weights of a dense DiT, and return others as they are.

        Raises:
            ValueError: If no router is among the weights.
        """
        if any(name.startswith("blocks.") for name in weights) and not any(
            map(_is_router, weights)
        ):
            raise ValueError(
                "these are weights of a dense DiT, which has no routers, and this network needs "
                "some; load them into a dit_* network, or start a fine-tuning with load_dense"
            )
        return weights

    def load_dense(self, weights: dict[str, Tensor]) -> None:
        """Start from the weights of a dense DiT; the routers keep theirs, all gates on at first.

        Raises:
            ValueError: If names or shapes differ by more than the routers.
        """
        shapes = {name: value.shape for name, value in weights.items()}
        state = self.state_dict()
        own = {name: value.shape for name, value in state.items() if not _is_router(name)}
        differing = sorted(name for name in own | shapes if own.get(name) != shapes.get(name))
        if differing:
            raise ValueError(
                f"not the weights of this network's dense DiT ({len(differing)} keys or shapes "
                f"differ): {', '.join(differing[:6])}"
            )
        self.load_state_dict(weights, strict=False)

    # Gates

    def gate_shapes(self, batch: int) -> dict[str, tuple[int, int, int]]:
        """Return the shapes of the noise of gates, by the fields of `Gates`."""
        switched = (batch, len(self.blocks), self.heads - 1)
        tokens = (batch, len(self.blocks), self.grid[0] * self.grid[1])
        return dict(heads=switched, groups=switched, tokens=tokens)

    @property
    def num_gates(self) -> int:
        """Number of gates of one image."""
        return sum(blocks * gates for _, blocks, gates in self.gate_shapes(1).values())

    def gated_macs(self) -> tuple[int, int]:
        """Return the multiply-accumulates of a block's attention and MLP, for `used_share`."""
        tokens = self.grid[0] * self.grid[1]
        attention = 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim
        return attention, 2 * tokens * self.dim * self.hidden

    @property
    def gated_work(self) -> int:
        """Multiply-accumulates of one image that the gates can switch off."""
        return len(self.blocks) * sum(self.gated_macs())

    # Paths

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (N, T, D), the condition (N, D) and its part that is time (N, D)."""
        check_grid(x, self.input_size, self.patch, "DyDiT")
        time = self.t_embedder(t)
        return self.x_embedder(x) + self.pos_embed, time + self.y_embedder(y), time

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.final_layer(x, c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.grid, self.patch)  # (N, C_out, H, W)

    def forward_with_gates(
        self, x: Tensor, t: Tensor, y: Tensor, noise: Gates | None = None
    ) -> tuple[Tensor, Gates]:
        """Return the masked prediction and its gates, through which gradients reach the routers.

        Args:
            x: (N, C, H, W)
            t: (N,)
            y: (N,)
            noise: Logistic noise of `gate_shapes`, or None for the gates of inference.
        """
        # Every block decides on its own gates.
        x, c, time = self._embed(x, t, y)
        gates = []
        for index, block in enumerate(self.blocks):
            x, of_block = block(x, c, time, noise.of_block(index) if noise else None)
            gates.append(of_block)

        # Gates of all blocks stand in one tensor of each kind.
        stacked = Gates(
            heads=torch.stack([gate.heads for gate in gates], dim=1),
            groups=torch.stack([gate.groups for gate in gates], dim=1),
            tokens=torch.stack([gate.tokens for gate in gates], dim=1),
        )
        return self._predict(x, c), stacked

    def forward_with_share(
        self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None, complete: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the masked prediction, and the share of the gated work of each image, (N,).

        Args:
            x: (N, C, H, W)
            t: (N,)
            y: (N,)
            noise: Logistic noise of all gates (N, num_gates), or None for the gates of inference.
            complete: Whether to leave the gates out.
        """
        if complete:
            return self.forward_complete(x, t, y), torch.ones(len(x), device=x.device)
        gates = None if noise is None else self._unpack(noise)
        prediction, opened = self.forward_with_gates(x, t, y, gates)
        return prediction, used_share(opened, *self.gated_macs())

    def _unpack(self, noise: Tensor) -> Gates:
        """Cut noise (N, num_gates) into that of heads, groups and tokens."""
        shapes = self.gate_shapes(len(noise))
        parts = noise.split([blocks * gates for _, blocks, gates in shapes.values()], dim=1)
        pairs = zip(shapes.items(), parts, strict=True)
        return Gates(**{name: part.reshape(shape) for (name, shape), part in pairs})

    def forward_complete(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction without gates, which is DiT's."""
        x, c, _ = self._embed(x, t, y)
        for block in self.blocks:
            assert isinstance(block, DyDiTBlock)
            x = block.forward_complete(x, c)  # (N, T, D)
        return self._predict(x, c)

    def forward_gathered(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction of the masked path, to rounding, and compute only what is on.

        Raises:
            ValueError: If the images of the batch differ in time.
        """
        if (t != t[0]).any():
            raise ValueError(
                "the gathered path cuts weights for one time: give all images of a batch the same t"
            )
        x, c, time = self._embed(x, t, y)
        c = c.expand(len(x), -1)  # a gathered token looks up its image's row
        for block in self.blocks:
            assert isinstance(block, DyDiTBlock)
            x = block.forward_gathered(x, c, time)  # (N, T, D)
        return self._predict(x, c)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.gathered and not self.training:
            return self.forward_gathered(x, t, y)
        return self.forward_with_gates(x, t, y)[0]


def _is_router(name: str) -> bool:
    return any(part in name for part in ROUTERS)


register(
    DyDiT,
    dict(
        dydit_s_2=WIDTHS["s"] | dict(patch=2),
        dydit_b_2=WIDTHS["b"] | dict(patch=2),
        dydit_l_2=WIDTHS["l"] | dict(patch=2),
        dydit_xl_2=WIDTHS["xl"] | dict(patch=2),
    ),
    tiny=dict(depth=2, dim=48, heads=3),
    guided_channels=3,
    exceptions=Exceptions(frozen={"pos_embed": "positions are a fixed sine-cosine table"}),
)
