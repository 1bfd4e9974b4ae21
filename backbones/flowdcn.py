"""FlowDCN: Wang et al., "FlowDCN: Exploring DCN-like Architectures for Fast Image Generation with
Arbitrary Resolution", NeurIPS 2024.

Source: arXiv:2410.22655 and github.com/MCG-NJU/FlowDCN at aa48042.

Every token samples nine points of the map of values, at places that it predicts, and adds them up
with weights that it predicts. There is no other mixing and no position embedding. The network
predicts a velocity. Time runs from noise at 0 to data at 1 and is embedded as it is.

Legend: N batch, C channels, p patch, (H, W) grid of tokens, T = HW tokens, D width, G groups,
K = 9 points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.kernels import deformable
from backbones.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchFinal,
    RMSNorm,
    SwiGlu,
    TimestepEmbedder,
    check_grid,
    gated,
    modulate,
    unpatchify,
    xavier_flat_,
    zero_,
    zero_bias_,
)
from backbones.mixers import build_mixer
from backbones.registry import Exceptions, register

DEFORMABLE = "deformable"  # the authors' sampling
SIDE = 3  # points lie around a grid of 3 x 3
POINTS = SIDE**2
REACH = 6.0  # tokens that the widest grid's points lie apart


class DeformableConv(nn.Module):
    """Add up nine points of the values for each token and group: (N, T, D) -> (N, T, D).

    The offset of a point is (predicted + prior) * sigmoid(predicted scale + scale of its group) *
    6 tokens. The weights are neither normalised nor squashed.
    """

    def __init__(self, dim: int, groups: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.groups = groups
        self.grid = grid
        self.deformables_prior = nn.Parameter(prior_points(), requires_grad=False)
        self.deformables_scale = nn.Parameter(initial_scales(groups))
        self.v = Linear(dim, dim)
        self.qk_deformables = Linear(dim, 2 * groups * POINTS)
        self.qk_scales = Linear(dim, groups * POINTS, bias=False)
        self.qk_weights = Linear(dim, groups * POINTS)
        self.out = Linear(dim, dim)

    def init_weights(self) -> None:
        """Start each group on its own 3 x 3 grid, with the same weights for all tokens."""
        zero_bias_(self.v)
        zero_bias_(self.out)
        zero_(self.qk_deformables, self.qk_scales)
        nn.init.zeros_(self.qk_weights.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, shape = len(x), (*self.grid, self.groups)
        values = self.v(x).reshape(n, *shape, -1)  # (N, H, W, G, D/G)
        offsets = self.qk_deformables(x).reshape(n, *shape, POINTS, 2)
        scales = self.qk_scales(x).reshape(n, *shape, POINTS, 1)
        weights = self.qk_weights(x).reshape(n, *shape, POINTS)

        # Points are (column, row), counted from the token.
        scales = (scales + self.deformables_scale).sigmoid()  # (N, H, W, G, K, 1)
        points = (offsets + self.deformables_prior) * scales * REACH  # (N, H, W, G, K, 2)
        return self.out(deformable(values, points, weights).flatten(3).flatten(1, 2))


def prior_points() -> Tensor:
    """Return the points of a 3 x 3 grid around 0, as (column, row): (1, 1, 1, 1, K, 2)."""
    place = torch.arange(POINTS, dtype=torch.float32)
    columns, rows = place % SIDE - 1, (place / SIDE).floor() - 1
    return torch.stack([columns, rows], dim=-1).view(1, 1, 1, 1, POINTS, 2)


def initial_scales(groups: int) -> Tensor:
    """Return scales whose sigmoids rise evenly to nearly 1: (1, 1, 1, G, 1, 1)."""
    shares = torch.arange(1, groups + 1, dtype=torch.float64) / groups - 1e-4
    return shares.logit().float().view(1, 1, 1, groups, 1, 1)


class MapMixer(nn.Module):
    """A mixer of maps, such as DiCo's Conv Module, on tokens: (N, T, D) -> (N, T, D)."""

    def __init__(self, mixer: str, dim: int, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        self.grid = grid
        self.mixer = build_mixer(mixer, dim, size=grid, index=index)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, self.grid)  # (N, D, H, W)
        return self.mixer(x).flatten(2).transpose(1, 2)  # (N, T, D)


class FlowDCNBlock(nn.Module):
    """Sampling and gated MLP, each modulated and gated by adaLN, which does not start at zero."""

    def __init__(
        self, dim: int, groups: int, grid: tuple[int, int], mixer: str, index: int
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = (
            DeformableConv(dim, groups, grid)
            if mixer == DEFORMABLE
            else MapMixer(mixer, dim, grid, index)
        )
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGlu(dim, int(2 * int(4 * dim) / 3))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))  # (N, T, D)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)


class FlowDCN(nn.Module):
    """A stack of FlowDCN blocks over patches; `learn_sigma` adds channels that are dropped.

    `mixer` names what stands in place of the sampling. With "conv" it is DiCo's Conv Module, as in
    Table 12 of the second version of DiCo's paper: a reconstruction, as no code was published.
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
        groups: int = 6,
        mixer: str = DEFORMABLE,
    ) -> None:
        super().__init__()
        if input_size % patch or dim % groups:
            raise ValueError(
                "FlowDCN needs input_size divisible by patch and dim by groups, "
                f"got input_size {input_size}, patch {patch}, dim {dim}, groups {groups}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch = patch
        self.out_channels = in_channels
        self.grid = (input_size // patch, input_size // patch)

        # The authors' order: their training checkpoints keep the average as a list of it.
        head_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(in_channels, dim, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.final_layer = PatchFinal(dim, patch, head_channels)
        self.blocks = nn.ModuleList(
            FlowDCNBlock(dim, groups, self.grid, mixer, index) for index in range(depth)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """Keep PyTorch's initial values but for embedders, sampling and head."""
        xavier_flat_(self.x_embedder.proj)
        self.t_embedder.init_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero_(self.final_layer.adaLN_modulation, self.final_layer.linear)
        for layer in self.modules():
            if isinstance(layer, DeformableConv):
                layer.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, self.input_size, self.patch, "FlowDCN")
        x = self.x_embedder(x)  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*C or p*p*2C)
        return unpatchify(x, self.grid, self.patch)[:, : self.out_channels]  # (N, C, H, W)


register(
    FlowDCN,
    dict(
        flowdcn_s_2=dict(dim=384, depth=12, groups=6),
        flowdcn_b_2=dict(dim=768, depth=12, groups=12),
        flowdcn_l_2=dict(dim=1024, depth=24, groups=16),
        flowdcn_xl_2=dict(dim=1152, depth=28, groups=16),
    ),
    tiny=dict(depth=2, dim=24, groups=3),
    exceptions=Exceptions(
        frozen={"*.deformables_prior": "the grid around which points lie is fixed"},
        drops_variance="a velocity has no variance; the wider head's second half is dropped",
    ),
)
