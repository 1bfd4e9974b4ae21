"""LDM: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 3.3.

ADM's U-Net without scale and shift, with convolutions that resample, and with transformer blocks that attend to the
label: one context token, on which the softmax is 1, so that norm2, attn2.to_q and attn2.to_k do not reach the output.
The authors keep the label's table in a module of its own, cond_stage_model; `LDM.from_checkpoint` maps their names.
Legend: N batch, C width of a layer, E = 4D width of the embedding, K context width, h heads, e = C / h, T = HW tokens
(T' of the context).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import Linear, Pointwise, check_grid, timestep_sinusoid, zero_
from backbones.registry import register


class ClassTable(nn.Module):
    """A row per class, as a context of one token: (N,) -> (N, 1, K)."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y[:, None])


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the embedding added between them."""

    def __init__(self, dim: int, dim_out: int, dim_emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, dim), nn.SiLU(), nn.Conv2d(dim, dim_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(dim_emb, dim_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, dim_out),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(dim_out, dim_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if dim_out == dim else Pointwise(dim, dim_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(c)[..., None, None]  # (N, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)  # (N, C_out, H, W)


class Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2H, 2W)


class CrossAttention(nn.Module):
    """Attention of x to a context, which is x itself in self-attention."""

    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim_context, dim, bias=False)
        self.to_v = Linear(dim_context, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (
            p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projected
        )  # 3 x (N, h, T, e)
        # Not kernels.attention: LDM scales the logits, and its cost counts those h T T' products; and einsum, because
        # it takes the values of a single token by a multiply, which the published core count leaves out.
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)  # (N, h, T, T')
        h = torch.einsum("nhqk,nhke->nqhe", weights, v)  # (N, T, h, e)
        return self.to_out(h.flatten(2))  # (N, T, C)


class GEGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # (N, T, 4C)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (N, T, C)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, dim_context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, dim_context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x  # (N, T, C)
        x = self.attn2(self.norm2(x), context) + x  # (N, T, C)
        return self.ff(self.norm3(x)) + x  # (N, T, C)


class SpatialTransformer(nn.Module):
    """A transformer block over pixels, between two 1x1 convolutions."""

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
    """`attention_at` are the downsampling factors whose levels attend; `heads` None means one for every `head_dim`."""

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
        attention_at: tuple[int, ...] = (8, 4, 2),
        heads: int | None = None,
        head_dim: int = 32,
        context_dim: int = 512,
        null_label: bool = True,
    ) -> None:
        super().__init__()
        widths, last = [dim * m for m in multipliers], len(multipliers) - 1
        if any(width % 32 or width % (heads or head_dim) for width in widths):
            raise ValueError(
                f"LDM needs widths divisible by 32 and by {f'heads {heads}' if heads else f'head_dim {head_dim}'}, got {widths}"
            )
        if input_size % 2**last:
            raise ValueError(
                f"LDM halves its input {last} times: input_size must be divisible by {2**last}, got {input_size}"
            )
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.dim, self.multiple, dim_emb = dim, 2**last, 4 * dim

        def layers(width: int, level: int) -> nn.ModuleList:
            """A residual block from `width` channels to the level's, then a transformer where the level has it."""
            block = nn.ModuleList([ResBlock(width, widths[level], dim_emb)])
            return block.append(attend(widths[level])) if 2**level in attention_at else block

        def attend(width: int) -> SpatialTransformer:
            return SpatialTransformer(width, context_dim, heads or width // head_dim)

        self.cond_stage_model = ClassTable(num_classes + null_label, context_dim)
        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))
        width = dim
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])]
        )
        skips = [width]
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                self.input_blocks.append(layers(width, level))
                width = widths[level]
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, dim_emb), attend(width), ResBlock(width, width, dim_emb)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(num_res_blocks + 1):
                block = layers(width + skips.pop(), level)
                width = widths[level]
                if level and index == num_res_blocks:
                    block.append(Upsample(width))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, self.out_channels, 3, padding=1)
        )
        self._init_weights()

    @staticmethod
    def from_checkpoint(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published `state_dict` under this file's names; its autoencoder and schedule are left out.

        The authors sample with the moving averages that it holds under model_ema, named without dots.
        """
        prefix = "model.diffusion_model."
        if not any(name.startswith(prefix) for name in weights):
            return weights
        names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
        averaged = {
            name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in names
        }
        ours = {
            name: weights.get(averaged[name], weights[theirs]) for name, theirs in names.items()
        }
        return ours | {
            name: w for name, w in weights.items() if name.startswith("cond_stage_model.")
        }

    def _init_weights(self) -> None:
        """torch's defaults, but residual convolutions, transformers and the head start at zero."""
        zero_(self.out[2])
        zero_(*(block.out_layers[3] for block in self.modules() if isinstance(block, ResBlock)))
        zero_(
            *(block.proj_out for block in self.modules() if isinstance(block, SpatialTransformer))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, self.multiple, "LDM")
        c = self.time_embed(
            timestep_sinusoid(t, self.dim).to(self.time_embed[0].weight.dtype)
        )  # (N, E)
        context = self.cond_stage_model(y)  # (N, 1, K)
        skips = []
        for block in self.input_blocks:
            x = _run(block, x, c, context)  # (N, C, H / 2^level, W / 2^level)
            skips.append(x)
        x = _run(self.middle_block, x, c, context)
        for block in self.output_blocks:
            x = _run(
                block, torch.cat([x, skips.pop()], dim=1), c, context
            )  # (N, C, H / 2^level, W / 2^level)
        return self.out(x)  # (N, C_out, H, W)


def _run(block: nn.ModuleList, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
    for layer in block:
        if isinstance(layer, ResBlock):
            x = layer(x, c)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context)
        else:
            x = layer(x)
    return x


register(
    LDM,
    dict(
        ldm_4=dict(
            input_size=64,
            in_channels=3,
            dim=192,
            multipliers=(1, 2, 3, 5),
            attention_at=(8, 4, 2),
            heads=1,
        ),
        ldm_8=dict(
            input_size=32,
            in_channels=4,
            dim=256,
            multipliers=(1, 2, 4),
            attention_at=(4, 2, 1),
            null_label=False,
        ),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_at=(4, 2),
        context_dim=12,
    ),
)
