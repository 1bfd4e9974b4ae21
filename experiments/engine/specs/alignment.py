"""Representation alignment as a part of a training's spec. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

JUDGE = "cifar_judge"


@dataclass(frozen=True)
class Alignment:
    """REPA's objective: tokens after a block, projected, turn to an encoder's patch features.

    Source: REPA (arXiv:2410.06940) and github.com/sihyun-yu/REPA.
    """

    # After which the tokens are taken, as the network's weights name it: 'blocks.3'.
    block: str
    # SHA-256 of the file of the encoder's weights.
    sha256: str
    # 'cifar_judge', the suite's classifier; or timm's name of a DINOv2, 'vit_base_patch14_dinov2'.
    encoder: str = JUDGE
    # Of the alignment beside the denoising loss.
    weight: float = 0.5
    # Width of the two hidden layers of the projection.
    hidden: int = 2048
