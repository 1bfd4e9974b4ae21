"""SiT: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", ECCV 2024.

DiT's network, predicting a velocity. Time is taken as it is: 0 (noise) to 1 (data), not multiplied by 1000.
With `learn_sigma` the head keeps DiT's 2C channels and the second half is dropped; the released 256 checkpoint has
such a head, the 512 one has C channels (`learn_sigma=False`).
"""

from __future__ import annotations

from torch import Tensor

from backbones.dit import DiT
from backbones.registry import register


class SiT(DiT):
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


_WIDTHS = {
    "s": dict(depth=12, dim=384, heads=6),
    "b": dict(depth=12, dim=768, heads=12),
    "l": dict(depth=24, dim=1024, heads=16),
    "xl": dict(depth=28, dim=1152, heads=16),
}

register(
    SiT,
    {
        f"sit_{size}_{patch}": options | dict(patch=patch)
        for size, options in _WIDTHS.items()
        for patch in (2, 4, 8)
    },
    tiny=dict(depth=2, dim=24, heads=3),
    guided_channels=3,
)
