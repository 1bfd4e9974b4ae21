"""DiMR: Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion
Models and Time-Dependent Layer Normalization", NeurIPS 2024.

Source: arXiv:2406.09416 and github.com/qihao067/DiMR at fa141ae. The sizes XL/2R and G/2R are the
authors'. The size XL/3R is a reconstruction: its configuration was not released. It has the 525M
parameters that others report of it.

A cascade of U-shaped branches, each on its own grid, low resolution first. The first is a
transformer, the others are ConvNeXts. Every branch reads the whole noisy image. Time enters by
norms alone, and the label by one token of the transformer. The network predicts the noise alone.
Time is a step from 1 to 1000, not from 0 to 999.

Legend: N batch, C channels, (H, W) input, p patch and g = H / p grid of a branch, D its width,
S tokens, F features that a branch hands on, r ratio of two grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.layers import Conv3x3, Linear, check_grid, zero_bias_
from backbones.positions import PositionTable, resize_positions
from backbones.registry import Exceptions, register
from backbones.time_norms import TimeLayerNorm, TimeRMSNorm

# Blocks


class Depthwise(nn.Conv2d):
    """Convolve each channel alone by the fastest implementation: (N, g, g, D) -> same."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # (N, D, g, g)
        return kernels.depthwise(x, self.weight, self.bias).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Normalise and attend among all tokens: (N, S, D), (N,) -> (N, S, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = TimeRMSNorm(dim)
        self.query_key_value = Linear(dim, 3 * dim, bias=False)
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.query_key_value(self.norm(x, s)).view(n, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, h, S, D/h)
        h = kernels.attention(q, k, v)  # (N, h, S, D/h)
        return self.dense(h.transpose(1, 2).reshape(n, t, d))  # (N, S, D)


class GatedMlp(nn.Module):
    """Normalise and apply a gated MLP, of which w0 is activated: (N, ..., D), (N,) -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = TimeRMSNorm(dim)
        self.w0 = Linear(dim, hidden)
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(hidden, dim)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h = self.norm(x, s)
        return self.w2(F.gelu(self.w0(h)) * self.w1(h))


class TransformerBlock(nn.Module):
    """Attention and a gated MLP, each added to its input."""

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.block1 = Attention(dim, heads)
        self.block2 = GatedMlp(dim, hidden)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = x + self.block1(x, s)  # (N, S, D)
        return x + self.block2(x, s)  # (N, S, D)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution without a norm and a gated MLP, each added to its input."""

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Identity(), Depthwise(dim, kernel))
        self.block2 = GatedMlp(dim, hidden)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = x + self.block1(x)  # (N, g, g, D)
        return x + self.block2(x, s)  # (N, g, g, D)


# Branches


@dataclass(frozen=True)
class BranchSize:
    """What the parts of a branch have in common."""

    grid: int
    """Height and width of its grid."""

    patch: int
    """Pixels that a side of a cell covers."""

    dim: int
    """Width."""

    hidden: int
    """Width inside the MLP."""

    depth: int
    """Blocks of the configuration; the authors build one more if the number is even."""

    @property
    def skips(self) -> int:
        """Blocks on either side of the middle one."""
        return self.depth // 2

    @property
    def num_blocks(self) -> int:
        """Blocks that are built."""
        return 2 * self.skips + 1

    @property
    def num_features(self) -> int:
        """Channels that the branch hands on: its input and the output of every block."""
        return self.dim * (self.num_blocks + 1)


class Enlarge(nn.Module):
    """Turn each cell into r x r cells by one linear map: (N, g, g, F) -> (N, rg, rg, D).

    The outputs of a cell lie in the order of row, column and channel. torch's pixel shuffle has the
    channel first.
    """

    def __init__(self, num_features: int, dim: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.kernel = Linear(num_features, dim * ratio * ratio)

    def forward(self, x: Tensor) -> Tensor:
        h = self.kernel(x).unflatten(-1, (self.ratio, self.ratio, -1))  # (N, g, g, r, r, D)
        return h.transpose(2, 3).flatten(1, 2).flatten(2, 3)  # (N, rg, rg, D)


class Branch(nn.Module):
    """A U of blocks on one grid; its features are its input and every block's output."""

    called_apart = ("output_layer",)

    def __init__(self, size: BranchSize, channels: int, blocks: list[nn.Module], head: bool):
        super().__init__()
        dim = size.dim
        stem = nn.Conv2d(channels, dim, size.patch, stride=size.patch)
        positions = PositionTable(size.grid, dim)
        self.input_layer = nn.Sequential(nn.Identity(), stem, nn.Identity(), positions)
        self.blocks = nn.ModuleList(blocks)
        self.skip_denses = nn.ModuleList(Linear(2 * dim, dim) for _ in range(size.skips))
        layers = TimeLayerNorm(dim), nn.Identity(), Conv3x3(dim, channels)
        self.output_layer = nn.ModuleList(layers) if head else None

    def run_blocks(self, x: Tensor, s: Tensor) -> list[Tensor]:
        """Return x and the outputs of all blocks; each has the shape of x."""
        skips: list[Tensor] = []
        features = [x]
        half = len(self.skip_denses)
        for index, block in enumerate(self.blocks):
            if index > half:
                joined = torch.cat([x, skips.pop()], dim=-1)  # (..., 2D)
                x = self.skip_denses[index - half - 1](joined)
            x = block(x, s)
            if index < half:
                skips.append(x)
            features.append(x)
        return features

    def predict(self, x: Tensor, s: Tensor) -> Tensor:
        """Predict an image of the branch's grid: (N, g, g, D) -> (N, C, g, g)."""
        assert self.output_layer is not None
        norm, _, conv = self.output_layer
        return conv(norm(x, s).permute(0, 3, 1, 2))


class TransformerBranch(Branch):
    """The first branch: it reads the label as a token before those of the grid."""

    def __init__(
        self, size: BranchSize, channels: int, num_classes: int, heads: int, head: bool
    ) -> None:
        shape = (size.dim, size.hidden, heads)
        blocks: list[nn.Module] = [TransformerBlock(*shape) for _ in range(size.num_blocks)]
        super().__init__(size, channels, blocks, head)
        self.class_embeds = nn.Embedding(num_classes + 1, size.dim)

    def forward(self, x: Tensor, s: Tensor, y: Tensor) -> list[Tensor]:
        grid = self.input_layer(x)  # (N, g, g, D)
        label = self.class_embeds(y)[:, None]  # (N, 1, D)
        tokens = torch.cat([label, grid.flatten(1, 2)], dim=1)  # (N, S, D)
        features = self.run_blocks(tokens, s)  # each (N, S, D)
        return [feature[:, 1:].view(grid.shape) for feature in features]  # each (N, g, g, D)


class ConvNeXtBranch(Branch):
    """A later branch: it adds the features of the branch below to its input."""

    def __init__(
        self, size: BranchSize, below: BranchSize, channels: int, kernel: int, head: bool
    ) -> None:
        shape = (size.dim, size.hidden, kernel)
        blocks: list[nn.Module] = [ConvNeXtBlock(*shape) for _ in range(size.num_blocks)]
        super().__init__(size, channels, blocks, head)
        enlarge = Enlarge(below.num_features, size.dim, size.grid // below.grid)
        norms = TimeLayerNorm(below.num_features), TimeLayerNorm(size.dim)
        self.upsample = nn.ModuleList([norms[0], enlarge, norms[1]])

    def forward(self, x: Tensor, s: Tensor, features: Tensor) -> list[Tensor]:
        norm1, enlarge, norm2 = self.upsample
        h = norm2(enlarge(norm1(features, s)), s)  # (N, g, g, D)
        return self.run_blocks(self.input_layer(x) + h, s)  # each (N, g, g, D)


class DiMR(nn.Module):
    """A transformer on a low resolution, then ConvNeXts up to the full one.

    Options hold one number per branch, low resolution first, and `kernel_sizes` one per ConvNeXt.
    An even depth is rounded up by one, as in the authors' code. `low_heads=False` leaves out what
    only the multi-scale loss needs: all heads but the last. It changes no prediction.
    """

    # Parameters that weight decay leaves alone, by the beginning of their names.
    undecayed = "nodecay_"

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patches: tuple[int, ...] = (2, 1),
        dims: tuple[int, ...] = (960, 480),
        hidden: tuple[int, ...] = (1920, 960),
        depths: tuple[int, ...] = (39, 20),
        heads: int = 16,
        kernel_sizes: tuple[int, ...] = (7,),
        low_heads: bool = True,
    ) -> None:
        super().__init__()
        per_branch = dict(patches=patches, dims=dims, hidden=hidden, depths=depths)
        _check_options(kernel_sizes, **per_branch)
        sizes = [
            BranchSize(input_size // patch, patch, *widths)
            for patch, *widths in zip(patches, dims, hidden, depths, strict=True)
        ]
        _check_sizes(sizes, heads, input_size)
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = in_channels
        self.num_classes = num_classes
        self.patches = patches
        self.grid = (sizes[0].grid, sizes[0].grid)  # of the transformer

        # The last branch predicts; the heads of the others serve the multi-scale loss alone.
        has_head = [low_heads] * (len(sizes) - 1) + [True]
        first = TransformerBranch(sizes[0], in_channels, num_classes, heads, has_head[0])
        self.stages = nn.ModuleList([first])
        for index, kernel in enumerate(kernel_sizes, start=1):
            pair = sizes[index], sizes[index - 1]
            self.stages.append(ConvNeXtBranch(*pair, in_channels, kernel, has_head[index]))
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw linear layers and tables from N(0, 0.02); convolutions keep torch's defaults."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                zero_bias_(layer)
            elif isinstance(layer, nn.Embedding):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif isinstance(layer, PositionTable):
                nn.init.trunc_normal_(layer.position_embeddings["weight"], std=0.02)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of this network at another input size by interpolating its positions."""
        tables = {
            f"{name}.position_embeddings.weight": layer.grid
            for name, layer in self.named_modules()
            if isinstance(layer, PositionTable)
        }
        return weights | {name: resize_positions(weights[name], g) for name, g in tables.items()}

    def from_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the heads of low branches from the authors' weights if this network has none."""
        dropped = tuple(
            f"stages.{index}.output_layer."
            for index, stage in enumerate(self.stages)
            if isinstance(stage, Branch) and stage.output_layer is None
        )
        return {name: value for name, value in weights.items() if not name.startswith(dropped)}

    def multiscale(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Return the predictions of all branches that have a head, low resolution first.

        The last one is the network's prediction. The authors' loss compares the others with the
        noise at their resolution: at ratio k, the sum of each k x k block divided by k.

        Returns:
            (N, C, g, g) per branch, g its grid.
        """
        check_grid(x, self.input_size, self.patches[0], "DiMR")
        s = (t.float() / 500 - 1).to(x.dtype)  # (N,), in -1..1
        condition = y
        outputs: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Branch)
            features = stage(x, s, condition)
            if stage.output_layer is not None:
                outputs.append(stage.predict(features[-1], s))  # (N, C, g, g)
            if index + 1 < len(self.stages):
                condition = torch.cat(features, dim=-1)  # (N, g, g, F)
        return outputs

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.multiscale(x, t, y)[-1]  # (N, C, H, W)


def _check_options(kernel_sizes: tuple[int, ...], **per_branch: tuple[int, ...]) -> None:
    """Raise ValueError unless all options hold the same number of branches, and odd kernels."""
    lengths = {len(values) for values in per_branch.values()}
    if lengths != {len(kernel_sizes) + 1} or not all(kernel % 2 for kernel in kernel_sizes):
        listed = ", ".join(f"{name} {values}" for name, values in per_branch.items())
        raise ValueError(
            "DiMR needs one number per branch, and one odd kernel size per branch but the first, "
            f"got {listed}, kernel_sizes {kernel_sizes}"
        )


def _check_sizes(sizes: list[BranchSize], heads: int, input_size: int) -> None:
    """Raise ValueError if the branches do not fit together."""
    patches = [size.patch for size in sizes]
    nested = all(low > high and low % high == 0 for low, high in pairwise(patches))
    if not nested or patches[-1] != 1 or input_size % patches[0]:
        raise ValueError(
            "DiMR needs patches that divide one another down to 1, and input_size divisible by "
            f"the first, got input_size {input_size}, patches {patches}"
        )
    if sizes[0].dim % heads or min(size.depth for size in sizes) < 1:
        raise ValueError(
            "DiMR needs its first dim divisible by heads, and depths of at least 1, "
            f"got dim {sizes[0].dim}, heads {heads}, depths {[size.depth for size in sizes]}"
        )


_LOW_HEADS = "only the multi-scale loss trains the heads of low branches"
_OPEN_HEAD = "the authors start no weight of the network at zero"

register(
    DiMR,
    dict(
        dimr_xl_2r=dict(dims=(960, 480), hidden=(1920, 960), depths=(39, 20)),
        dimr_g_2r=dict(dims=(1152, 576), hidden=(2304, 1152), depths=(57, 29)),
    ),
    tiny=dict(dims=(24, 16), hidden=(48, 32), depths=(3, 2), heads=3, kernel_sizes=(3,)),
    exceptions=Exceptions(open_head=_OPEN_HEAD, unreached={"stages.0.output_layer.*": _LOW_HEADS}),
)

# A reconstruction: no configuration of three branches was released.
register(
    DiMR,
    dict(
        dimr_xl_3r=dict(
            input_size=64,
            patches=(4, 2, 1),
            dims=(960, 480, 240),
            hidden=(1920, 960, 480),
            depths=(39, 20, 20),
            kernel_sizes=(7, 7),
        ),
    ),
    tiny=dict(
        dims=(24, 16, 12), hidden=(48, 32, 24), depths=(3, 2, 1), heads=3, kernel_sizes=(3, 3)
    ),
    exceptions=Exceptions(
        open_head=_OPEN_HEAD, unreached={"stages.[01].output_layer.*": _LOW_HEADS}
    ),
)
