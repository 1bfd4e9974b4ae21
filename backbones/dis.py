"""DiS: Fei et al., "Scalable Diffusion Models with State Space Backbone", 2024.

Source: arXiv:2402.05608 and github.com/feizc/DiS.

Each block adds its input to a residual stream r in float32, and returns its mixer's output for r.
The long skips carry these increments, not the stream. The authors train with stochastic depth; here
it is an input: `kept` weighs each sample's increments.

Legend: N batch, C channels, (H, W) input, p patch, L = HW / p^2 patches, T = L + 2 tokens (label,
time, patches), D width, I = 2D inner width, K increments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
    check_grid,
    timestep_sinusoid,
    unpatchify,
)
from backbones.mamba import Mamba, float32_or_wider, mamba_init, selective_ssm
from backbones.positions import resize_positions
from backbones.registry import Exceptions, register


class BidirectionalMamba(Mamba):
    """Scan both ways between shared projections: (N, T, D) -> same.

    Each way has its own convolution, step sizes and states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        inner = self.x_proj.in_features
        projected = self.x_proj.out_features
        self.conv1d_b = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj_b = Linear(inner, projected, bias=False)
        self.dt_proj_b = Linear(self.dt_proj.in_features, inner)
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.D_b = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (N, I, T)
        ahead = selective_ssm(x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = selective_ssm(
            x.flip(-1),
            z.flip(-1),
            self.conv1d_b,
            self.x_proj_b,
            self.dt_proj_b,
            self.A_b_log,
            self.D_b,
        )
        both = ahead + back.flip(-1)  # (N, I, T)
        return self.out_proj(both.transpose(1, 2))  # (N, T, D)


class DiSBlock(nn.Module):
    """Map an increment and the stream, h and r, to mixer(norm(r + h)) and r + h.

    With `skip`, a long skip is merged into h first. `kept` (N, 1, 1) weighs h.
    """

    def __init__(self, dim: int, skip: bool = False) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(dim)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(
        self, h: Tensor, r: Tensor | None, skip: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.skip_linear is not None:
            assert skip is not None
            h = self.skip_linear(torch.cat([h, skip], dim=-1))  # (N, T, 2D) -> (N, T, D)
        r = add_increment(r, h, kept)  # (N, T, D)
        return self.mixer(self.norm(r)), r


def add_increment(r: Tensor | None, h: Tensor, kept: Tensor | None) -> Tensor:
    """Add an increment, weighed by `kept`, to the residual stream; start the stream without one."""
    if r is None:
        return float32_or_wider(h)
    return r + h if kept is None else r + h * kept


class DiS(nn.Module):
    """A stack of bidirectional Mamba blocks with long skips.

    `depth` counts the blocks besides the middle one.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        patch: int = 2,
        dim: int = 368,
        depth: int = 24,
    ) -> None:
        super().__init__()
        if input_size % patch or depth % 2 or dim % 2:
            raise ValueError(
                "DiS needs input_size divisible by patch and an even depth and dim, "
                f"got input_size {input_size}, patch {patch}, depth {depth}, dim {dim}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch, input_size // patch)
        num_patches = self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.time_embed = nn.Sequential(Linear(dim, 4 * dim), nn.SiLU(), Linear(4 * dim, dim))
        self.label_emb = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + num_patches, dim))
        self.in_blocks = nn.ModuleList(DiSBlock(dim) for _ in range(depth // 2))
        self.mid_block = DiSBlock(dim)
        self.out_blocks = nn.ModuleList(DiSBlock(dim, skip=True) for _ in range(depth // 2))
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.final_layer = PatchFinal(dim, patch, self.out_channels)
        mamba_init(self, depth)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        return weights | {"pos_embed": resize_positions(weights["pos_embed"], self.grid[0], 2)}

    def drop_rates(self, largest: float) -> list[float]:
        """Return the probability with which each of the K increments is dropped.

        As in the authors' code, it rises with depth and is the same for the last two.
        """
        depth = len(self.in_blocks) + len(self.out_blocks)
        return [*(largest * i / (depth - 1) for i in range(depth)), largest]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Tensor | None = None) -> Tensor:
        """Predict; `kept` (N, K) multiplies the increments to the stream, by default by 1."""
        check_grid(x, self.input_size, self.patch, "DiS")
        weights = iter(self._weights(kept))

        # Label, time and patches are the tokens.
        dtype = self.pos_embed.dtype
        time = self.time_embed(timestep_sinusoid(t, self.pos_embed.shape[-1]).to(dtype))  # (N, D)
        label = self.label_emb(y)  # (N, D)
        h = torch.cat([label[:, None], time[:, None], self.patch_embed(x)], dim=1)  # (N, T, D)
        h = h + self.pos_embed

        # The first block starts the stream, so its input has no weight.
        r = None
        skips = []
        for block in self.in_blocks:
            h, r = block(h, r, kept=None if r is None else next(weights))  # 2 x (N, T, D)
            skips.append(h)
        h, r = self.mid_block(h, r, kept=next(weights))
        for block in self.out_blocks:
            h, r = block(h, r, skips.pop(), next(weights))

        h = self.norm_f(add_increment(r, h, next(weights)))  # (N, T, D)
        h = self.final_layer(h, time + label)[:, 2:]  # (N, L, p*p*C_out)
        return unpatchify(h, self.grid, self.patch)  # (N, C_out, H, W)

    def _weights(self, kept: Tensor | None) -> Sequence[Tensor | None]:
        """Return the weight of every increment: K of (N, 1, 1), or None for 1."""
        if kept is None:
            return [None] * (len(self.in_blocks) + len(self.out_blocks) + 1)
        return kept[..., None, None].unbind(1)


register(
    DiS,
    dict(
        dis_s_2=dict(dim=368, depth=24),
        dis_b_2=dict(dim=768, depth=24),
        dis_m_2=dict(dim=768, depth=48),
        dis_l_2=dict(dim=1024, depth=48),
        dis_h_2=dict(dim=1536, depth=48),
    ),
    tiny=dict(dim=20, depth=4),
    guided_channels=3,
    exceptions=Exceptions(open_head="the authors keep torch's default weights in the head"),
)
