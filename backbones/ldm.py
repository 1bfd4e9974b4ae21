"""LDM: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.

Source: arXiv:2112.10752, section 3.3, and github.com/CompVis/latent-diffusion at a506df5.

ADM's U-Net without scale and shift, with convolutions that resample, and with transformer blocks
that attend to the label. The label is one context token, on which the softmax is 1: norm2,
attn2.to_q and attn2.to_k do not reach the output. The authors keep the label table in a module of
its own, cond_stage_model; `LDM.from_checkpoint` maps their names to these.

Legend: N batch, C width of a layer, (H, W) grid, E = 4D width of the embedding, K context width,
h heads, e = C / h, T = HW tokens, T' tokens of the context. A level is the number of times the
input was halved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import Linear, Pointwise, check_grid, embed_time, run_layers, zero_
from backbones.registry import Exceptions, register


class ClassTable(nn.Module):
    """Look up a row per class, as a context of one token: (N,) -> (N, 1, K)."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y[:, None])


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the embedding added between them."""

    def __init__(self, dim: int, dim_out: int, dim_emb: int) -> None:
        super().__init__()
        conv1 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, dim), nn.SiLU(), conv1)
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(dim_emb, dim_out))

        # A dropout of 0 keeps the place of the next layer in the names of the weights.
        norm2 = nn.GroupNorm(32, dim_out)
        conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.out_layers = nn.Sequential(norm2, nn.SiLU(), nn.Dropout(0.0), conv2)
        self.skip_connection = nn.Identity() if dim_out == dim else Pointwise(dim, dim_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(c)[..., None, None]  # (N, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)  # (N, C_out, H, W)


class Downsample(nn.Module):
    """Halve the grid by a strided 3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the grid by copies, then convolve 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2H, 2W)


class CrossAttention(nn.Module):
    """Attend from x to a context; self-attention passes x as the context."""

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim_context, dim, bias=False)
        self.to_v = Linear(dim_context, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self._split(self.to_q(x))  # (N, h, T, e)
        k = self._split(self.to_k(context))  # (N, h, T', e)
        v = self._split(self.to_v(context))  # (N, h, T', e)

        # Not kernels.attention: LDM scales the logits, and its cost counts those h T T' products.
        # And einsum, because it multiplies by the values of a single token without a matrix
        # product; the published core count leaves such a multiply out.
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)  # (N, h, T, T')
        h = torch.einsum("nhqk,nhke->nqhe", weights, v)  # (N, T, h, e)
        return self.to_out(h.flatten(2))  # (N, T, C)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Project to values and gates; multiply the values by the GELU of the gates."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # (N, T, 4C)


class FeedForward(nn.Module):
    """Apply a gated MLP to each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (N, T, C)


class TransformerBlock(nn.Module):
    """Attend to the tokens, then to the context, then apply the MLP; each is pre-norm."""

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, dim_context, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x  # (N, T, C)
        x = self.attn2(self.norm2(x), context) + x  # (N, T, C)
        return self.ff(self.norm3(x)) + x  # (N, T, C)


class SpatialTransformer(nn.Module):
    """A transformer block over pixels, between two 1x1 convolutions: (N, C, H, W) -> same."""

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = Pointwise(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, dim_context, heads)])
        self.proj_out = Pointwise(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (N, T, C)
        for block in self.transformer_blocks:
            h = block(h, context)  # (N, T, C)
        return self.proj_out(h.transpose(1, 2).reshape(x.shape)) + x  # (N, C, H, W)


class LDM(nn.Module):
    """The U-Net of LDM.

    `attention_factors` lists downsampling factors: a level attends if its grid is the input's
    divided by such a factor. The authors' configurations call these numbers
    `attention_resolutions`. Without `heads`, a layer has one per `head_dim` channels.
    """

    def __init__(
        self,
        *,
        input_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        dim: int = 192,
        multipliers: tuple[int, ...] = (1, 2, 3, 5),
        num_res_blocks: int = 2,
        attention_factors: tuple[int, ...] = (8, 4, 2),
        heads: int | None = None,
        head_dim: int = 32,
        context_dim: int = 512,
        null_label: bool = True,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in multipliers]
        last = len(multipliers) - 1
        _check(input_size, widths, heads, head_dim)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.dim = dim
        self.multiple = 2**last
        dim_emb = 4 * dim

        def transformer(width: int) -> SpatialTransformer:
            return SpatialTransformer(width, context_dim, heads or width // head_dim)

        def level_block(width: int, level: int) -> nn.ModuleList:
            """Build a residual block to the level's width; add a transformer if it attends."""
            block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
            if 2**level in attention_factors:
                block.append(transformer(widths[level]))
            return block

        self.cond_stage_model = ClassTable(num_classes + null_label, context_dim)
        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))

        # The encoder keeps the width of every output: the decoder joins them last in, first out.
        width = dim
        stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        skips = [width]
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                self.input_blocks.append(level_block(width, level))
                width = widths[level]
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)

        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), transformer(width), ResBlock(width, width, dim_emb)]
        )

        # The decoder has one block more per level, which joins the output of the halving.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(num_res_blocks + 1):
                block = level_block(width + skips.pop(), level)
                width = widths[level]
                if level and index == num_res_blocks:
                    block.append(Upsample(width))
                self.output_blocks.append(block)

        head = nn.Conv2d(width, self.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), head)
        self._init_weights()

    @staticmethod
    def from_checkpoint(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of a published `state_dict`; leave its autoencoder and schedule out.

        The authors sample with moving averages. Their files hold these under model_ema, in names
        without dots.
        """
        prefix = "model.diffusion_model."
        if not any(name.startswith(prefix) for name in weights):
            return weights
        renamed = {}
        for name, weight in weights.items():
            if name.startswith(prefix):
                own = name.removeprefix(prefix)
                averaged = "model_ema." + f"diffusion_model.{own}".replace(".", "")
                renamed[own] = weights.get(averaged, weight)
            elif name.startswith("cond_stage_model."):
                renamed[name] = weight
        return renamed

    def _init_weights(self) -> None:
        """Keep torch's defaults, but start the head and every residual branch at zero."""
        zero_(self.out[2])
        for block in self.modules():
            if isinstance(block, ResBlock):
                zero_(block.out_layers[3])
            elif isinstance(block, SpatialTransformer):
                zero_(block.proj_out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, self.multiple, "LDM")
        conditions: dict[type[nn.Module], Tensor] = {
            ResBlock: embed_time(self.time_embed, t, self.dim),  # (N, E)
            SpatialTransformer: self.cond_stage_model(y),  # (N, 1, K)
        }

        skips = []
        for block in self.input_blocks:
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
            skips.append(x)
        x = run_layers(self.middle_block, x, conditions)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = run_layers(block, x, conditions)  # (N, C, H / 2^level, W / 2^level)
        return self.out(x)  # (N, C_out, H, W)


def _check(input_size: int, widths: list[int], heads: int | None, head_dim: int) -> None:
    """Raise ValueError for widths that do not split and for inputs that cannot be halved."""
    if any(width % 32 or width % (heads or head_dim) for width in widths):
        divisor = f"heads {heads}" if heads else f"head_dim {head_dim}"
        raise ValueError(f"LDM needs widths divisible by 32 and by {divisor}, got {widths}")
    last = len(widths) - 1
    if input_size % 2**last:
        raise ValueError(
            f"LDM halves its input {last} times: input_size must be divisible by {2**last}, "
            f"got {input_size}"
        )


_LDM_4 = dict(dim=192, multipliers=(1, 2, 3, 5), attention_factors=(8, 4, 2), heads=1)
_LDM_8 = dict(dim=256, multipliers=(1, 2, 4), attention_factors=(4, 2, 1), null_label=False)

register(
    LDM,
    dict(
        ldm_4=_LDM_4 | dict(input_size=64, in_channels=3),
        ldm_8=_LDM_8 | dict(input_size=32, in_channels=4),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_factors=(4, 2),
        context_dim=12,
    ),
    aliases={"attention_at": "attention_factors"},
    exceptions=Exceptions(
        sizes=(12, 16),
        unreached=dict.fromkeys(
            ("*.attn2.to_q.weight", "*.attn2.to_k.weight", "*.norm2.weight", "*.norm2.bias"),
            "the context is one token, so its softmax is 1 for every query and key",
        ),
        no_null_label="LDM-8 was trained without one; LDM-4 has its row",
    ),
)
