"""Stable Diffusion's U-Nets: SD 1.x, SDXL, and those cut down from them, BK-SDM and KOALA.

Sources: SD 1.x, arXiv:2112.10752; SDXL, Podell et al., arXiv:2307.01952; BK-SDM, Kim et al.,
arXiv:2305.15798; KOALA, Lee et al., arXiv:2312.04005. Configurations are those of the diffusers
files of these models; names of weights are those of the authors of LDM, and
`TextUNet.from_checkpoint` maps diffusers' names to them (unet_names.py).

The transformers attend to the tokens of a caption. SDXL adds an embedding of the pooled caption and
of six numbers, the sizes: height and width of the original image, its crop from top and left, and
the height and width that are wanted. Here they say an uncropped image of 8 x the input.

BK-SDM removes every second residual block with its transformer, Small and Tiny also the middle,
and Tiny the innermost level. KOALA has fewer transformer blocks too, and 700M no middle.

Legend: N batch, C width of a layer, (H, W) grid, D width of the stem, E = 4D width of the
embedding, L tokens of text, K their width, P width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from backbones.captions import Captions, Text, TextNetwork, Work
from backbones.kernels import attention
from backbones.layers import Linear, check_grid, embed_time, timestep_sinusoid
from backbones.registry import Exceptions, register
from backbones.unet import (
    CrossAttention,
    Plan,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UNet,
    check_levels,
    take_network,
)
from backbones.unet_names import own_name

SIZES = 6  # numbers that SDXL embeds beside the pooled caption
PIXELS = 8  # pixels of an image per place of the latent


class FusedAttention(CrossAttention):
    """Attention by its fastest implementation, as diffusers runs it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).transpose(1, 2)  # (N, T, h, e)


class TextAttention(FusedAttention):
    """Attention to text whose keys and values are projected before: (N, T, C), (N, L, 2C)."""

    called_apart = ("to_k", "to_v")

    def prepare(self, context: Tensor) -> Tensor:
        """Project the text to keys and values: (N, L, K) -> (N, L, 2C)."""
        return torch.cat([self.to_k(context), self.to_v(context)], dim=-1)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        k, v = keys_values.chunk(2, dim=-1)
        return self.attend(x, k, v)  # (N, T, C)


class TextBlock(TransformerBlock):
    """Attend to the tokens, then to the text, then apply the MLP."""

    own = FusedAttention
    other = TextAttention


class TokenTransformer(SpatialTransformer):
    """Transformer blocks between two linear layers on tokens: (N, C, H, W) -> same."""

    def __init__(self, dim: int, blocks: Iterator[TransformerBlock]) -> None:
        super().__init__(dim, blocks)
        self.proj_in = Linear(dim, dim)
        self.proj_out = Linear(dim, dim)

    def forward(self, x: Tensor, contexts: Iterator[Tensor]) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (N, T, C)
        for block in self.transformer_blocks:
            h = block(h, next(contexts))  # (N, T, C)
        return self.proj_out(h).transpose(1, 2).reshape(x.shape) + x  # (N, C, H, W)


class TextUNet(UNet, TextNetwork):
    """The U-Net of Stable Diffusion.

    `depths` lists the transformer blocks after each residual block of a level. `heads` is their
    number; without it, a layer has one per `head_dim` channels. `linear` projects tokens, not
    pixels. `pooled_dim` adds SDXL's embedding, with `size_dim` values for each of the sizes.
    """

    def __init__(
        self,
        *,
        input_size: int = 64,
        in_channels: int = 4,
        num_classes: int = 1000,
        dim: int = 320,
        multipliers: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        depths: tuple[int, ...] = (1, 1, 1, 0),
        middle: bool = True,
        heads: int | None = 8,
        head_dim: int = 64,
        linear: bool = False,
        context_tokens: int = 77,
        context_dim: int = 768,
        pooled_dim: int | None = None,
        size_dim: int = 256,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in multipliers]
        check_levels("a text U-Net", input_size, widths, heads or head_dim)
        if len(depths) != len(multipliers):
            raise ValueError(f"depths takes a number per level, {len(multipliers)}, got {depths}")
        self.input_size = input_size
        self.in_channels = self.out_channels = in_channels
        self.num_classes = num_classes
        self.dim = dim
        self.size_dim = size_dim
        self.context_dim = context_dim
        self.linear = linear
        self.level_heads = [heads or width // head_dim for width in widths]
        dim_emb = 4 * dim

        def transformer(width: int, depth: int) -> SpatialTransformer:
            number = heads or width // head_dim
            blocks = (TextBlock(width, context_dim, number) for _ in range(depth))
            return (TokenTransformer if linear else SpatialTransformer)(width, blocks)

        def mlp(inputs: int) -> nn.Sequential:
            return nn.Sequential(Linear(inputs, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))

        self.captions = Captions(num_classes, context_tokens, context_dim, pooled_dim, vocabulary)
        self.time_embed = mlp(dim)
        self.label_emb = nn.ModuleList()
        if pooled_dim is not None:
            self.label_emb.append(mlp(pooled_dim + SIZES * size_dim))
        self.add_blocks(
            Plan(
                channels=(in_channels, self.out_channels),
                dim=dim,
                widths=widths,
                num_res_blocks=num_res_blocks,
                depths=depths,
                middle=(depths[-1] or 1) if middle else None,
                transformer=transformer,
            )
        )
        self.init_weights()

    def text_work(self, text: Text) -> Work:
        # The order of these modules is that in which forward runs them.
        readers = (module for module in self.modules() if isinstance(module, TextAttention))
        work = [reader.prepare(text.context) for reader in readers]
        if not self.label_emb:
            return tuple(work)
        assert text.pooled is not None, "the captions give a pooled vector"
        return (self._embed_pooled(text.pooled, text.sizes), *work)

    def _embed_pooled(self, pooled: Tensor, sizes: Tensor | None) -> Tensor:
        """Embed the pooled caption and the six sizes: (N, P), (N, 6) -> (N, E)."""
        if sizes is None:
            side = PIXELS * self.input_size
            sizes = pooled.new_full((len(pooled), 6), side)
            sizes[:, 2:4] = 0  # nothing is cropped
        waves = timestep_sinusoid(sizes.flatten(), self.size_dim).view(len(pooled), -1)
        return self.label_emb[0](torch.cat([pooled, waves.to(pooled.dtype)], dim=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text) -> Tensor:
        check_grid(x, None, self.multiple, "a text U-Net")
        work = iter(self.read(y))
        embedding = embed_time(self.time_embed, t, self.dim)  # (N, E)
        if self.label_emb:
            embedding = embedding + next(work)
        conditions = {ResBlock: embedding, SpatialTransformer: work, TokenTransformer: work}
        return self.denoise(x, conditions)  # (N, C_out, H, W)

    def from_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of a published `state_dict`, of LDM's authors or of diffusers."""
        if (network := take_network(weights)) is not None:
            return network
        if "conv_in.weight" not in weights:
            return weights
        return {own_name(name, self): value for name, value in weights.items()}


_SD = dict(multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), num_res_blocks=2)
_SDXL = dict(
    input_size=128,
    multipliers=(1, 2, 4),
    heads=None,
    linear=True,
    context_dim=2048,
    pooled_dim=1280,
)

register(
    TextUNet,
    dict(
        sd_1=_SD,
        bk_sdm_base=_SD | dict(num_res_blocks=1),
        bk_sdm_small=_SD | dict(num_res_blocks=1, middle=False),
        bk_sdm_tiny=dict(num_res_blocks=1, middle=False, multipliers=(1, 2, 4), depths=(1, 1, 1)),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 1, 1),
        num_res_blocks=1,
        depths=(1, 1, 0),
        heads=2,
        context_tokens=5,
        context_dim=10,
    ),
    exceptions=Exceptions(sizes=(12, 16)),
)
register(
    TextUNet,
    dict(
        sdxl=_SDXL | dict(num_res_blocks=2, depths=(0, 2, 10)),
        koala_1b=_SDXL | dict(num_res_blocks=1, depths=(0, 2, 6)),
        koala_700m=_SDXL | dict(num_res_blocks=1, depths=(0, 2, 5), middle=False),
    ),
    tiny=dict(
        input_size=16,
        dim=64,
        multipliers=(1, 1, 1),
        num_res_blocks=1,
        depths=(0, 1, 2),
        head_dim=32,
        context_tokens=5,
        context_dim=10,
        pooled_dim=8,
    ),
    exceptions=Exceptions(sizes=(12, 16)),
)
