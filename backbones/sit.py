"""SiT: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
Interpolant Transformers", ECCV 2024.

Source: arXiv:2401.08740 and github.com/willisma/SiT at 947f95b.

DiT's network, predicting a velocity. Time runs from noise at 0 to data at 1 and is embedded as it
is, not multiplied by 1000. With `learn_sigma` the head keeps DiT's 2C channels, and the second half
is dropped. The released 256 checkpoint has such a head; the 512 one has C channels.

Legend: N batch, C channels, (H, W) input.
"""

from __future__ import annotations

from torch import Tensor

from backbones.dit import WIDTHS, DiT
from backbones.registry import Exceptions, register


class SiT(DiT):
    """DiT without the variance in its output."""

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
    ) -> None:
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
        )
        self.out_channels = in_channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : self.out_channels]  # (N, C, H, W)


register(
    SiT,
    dict(
        sit_s_2=WIDTHS["s"] | dict(patch=2),
        sit_s_4=WIDTHS["s"] | dict(patch=4),
        sit_s_8=WIDTHS["s"] | dict(patch=8),
        sit_b_2=WIDTHS["b"] | dict(patch=2),
        sit_b_4=WIDTHS["b"] | dict(patch=4),
        sit_b_8=WIDTHS["b"] | dict(patch=8),
        sit_l_2=WIDTHS["l"] | dict(patch=2),
        sit_l_4=WIDTHS["l"] | dict(patch=4),
        sit_l_8=WIDTHS["l"] | dict(patch=8),
        sit_xl_2=WIDTHS["xl"] | dict(patch=2),
        sit_xl_4=WIDTHS["xl"] | dict(patch=4),
        sit_xl_8=WIDTHS["xl"] | dict(patch=8),
    ),
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
    exceptions=Exceptions(
        frozen={"pos_embed": "positions are a fixed sine-cosine table"},
        drops_variance="the head is DiT's, as released; a velocity has no variance",
    ),
)
