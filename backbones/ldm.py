"""LDM: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.

Source: arXiv:2112.10752, section 3.3, and github.com/CompVis/latent-diffusion at a506df5.

The U-Net's transformer blocks attend to the label. The label is one context token, on which the
softmax is 1: norm2, attn2.to_q and attn2.to_k do not reach the output. The authors keep the label
table in a module of its own, cond_stage_model; `LDM.from_checkpoint` maps their names to these.

Legend: N batch, C channels, (H, W) grid, D width of the stem, E = 4D width of the embedding,
K context width.
"""

from __future__ import annotations

from itertools import repeat

from torch import Tensor, nn

from backbones.layers import Linear, check_grid, embed_time
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

__all__ = ["LDM", "CrossAttention"]


class ClassTable(nn.Module):
    """Look up a row per class, as a context of one token: (N,) -> (N, 1, K)."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y[:, None])


class LDM(UNet):
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
        check_levels("LDM", input_size, widths, heads or head_dim)
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.dim = dim
        self.context_dim = context_dim
        self.level_heads = [heads or width // head_dim for width in widths]
        dim_emb = 4 * dim

        def transformer(width: int, depth: int) -> SpatialTransformer:
            number = heads or width // head_dim
            blocks = (TransformerBlock(width, context_dim, number) for _ in range(depth))
            return SpatialTransformer(width, blocks)

        self.cond_stage_model = ClassTable(num_classes + null_label, context_dim)
        self.time_embed = nn.Sequential(Linear(dim, dim_emb), nn.SiLU(), Linear(dim_emb, dim_emb))
        self.add_blocks(
            Plan(
                channels=(in_channels, self.out_channels),
                dim=dim,
                widths=widths,
                num_res_blocks=num_res_blocks,
                depths=tuple(int(2**level in attention_factors) for level in range(len(widths))),
                middle=1,
                transformer=transformer,
            )
        )
        self.init_weights()

    @staticmethod
    def from_checkpoint(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of a published `state_dict`; leave its autoencoder and schedule out.

        The authors sample with moving averages. Their files hold these under model_ema, in names
        without dots.
        """
        network = take_network(weights)
        if network is None:
            return weights
        prefix = "cond_stage_model."
        return network | {key: value for key, value in weights.items() if key.startswith(prefix)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_grid(x, None, self.multiple, "LDM")
        conditions = {
            ResBlock: embed_time(self.time_embed, t, self.dim),  # (N, E)
            SpatialTransformer: repeat(self.cond_stage_model(y)),  # (N, 1, K) for each block
        }
        return self.denoise(x, conditions)  # (N, C_out, H, W)


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
