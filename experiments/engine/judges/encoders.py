"""Frozen encoders of images, whose patch features a training can be aligned with.

N images, g side of the grid of patches, z width of the features
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.data.locate import JUDGE_WEIGHTS, encoder_path
from experiments.engine.judges.cifar import ResidualClassifier, load_judge
from experiments.engine.judges.dinov2 import normalise
from experiments.engine.records.files import file_sha256
from experiments.engine.specs.alignment import JUDGE, Alignment
from experiments.engine.specs.spec import Data

PATCH = 14  # pixels on a side of DINOv2's patches
DINO = re.compile(r"vit_(small|base|large|giant)_patch14(_reg4)?_dinov2")


class JudgeEncoder(nn.Module):
    """The last map of the judge of CIFAR-10: (N, 3, 32, 32) in [-1, 1] -> (N, 64, 128)."""

    def __init__(self, judge: ResidualClassifier) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, x: Tensor) -> Tensor:
        judge = self.judge
        x = judge.down1(judge.stem(x))  # (N, 64, 16, 16)
        x = judge.down2(x + judge.block1(x))  # (N, 128, 8, 8)
        return (x + judge.block2(x)).flatten(2).mT  # (N, 64, 128)


class DinoEncoder(nn.Module):
    """DINOv2's patch tokens after its last norm: (N, 3, H, W) in [-1, 1] -> (N, g^2, z).

    The image becomes g x g patches, whatever its size, so that a patch meets a token of the
    network. REPA's 256 pixels become 224.
    """

    def __init__(self, network: Any, grid: int) -> None:
        super().__init__()
        self.network = network
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.network.forward_features(prepare_pixels(x, PATCH * self.grid))
        return tokens[:, self.network.num_prefix_tokens :]  # (N, g^2, z)


def prepare_pixels(x: Tensor, side: int) -> Tensor:
    """Normalise pixels in [-1, 1] as ImageNet's, then resize them bicubically, not antialiased."""
    return F.interpolate(normalise((x + 1) / 2), size=(side, side), mode="bicubic")


def load_encoder(alignment: Alignment, data: Data, grid: int) -> nn.Module:
    """Load the frozen encoder that a spec names, for a grid of tokens.

    Raises:
        ValueError: encoder, images and grid do not fit, or the file is missing or another one.
    """
    side = data.size * data.fold
    if data.channels != 3 * data.fold**2:
        raise ValueError(
            f"alignment needs images of 3 channels, and {data.name} as declared has none; "
            "declare data in pixels"
        )
    if alignment.encoder == JUDGE:
        if (data.name, side, grid) != ("cifar10", 32, 8):
            raise ValueError(
                f"{JUDGE} has features of 8x8 places for cifar10's 32x32 pixels, not {grid}x{grid} "
                f"for {side}x{side} pixels of {data.name}; name a block of 8x8 tokens, or a DINOv2"
            )
        _require_content(alignment, JUDGE_WEIGHTS)
        encoder: nn.Module = _read_judge()
    elif DINO.fullmatch(alignment.encoder):
        path = encoder_path(alignment.encoder)
        _require_content(alignment, path)
        encoder = _read_dino(path, grid)
    else:
        raise ValueError(
            f"unknown encoder {alignment.encoder!r}; known: {JUDGE}, and timm's DINOv2 "
            "vit_{small,base,large,giant}_patch14[_reg4]_dinov2"
        )
    return encoder.eval().requires_grad_(False)


def _require_content(alignment: Alignment, path: Path) -> None:
    """Raise ValueError unless an encoder's file is there and has the declared content."""
    if not path.is_file():
        raise ValueError(f"the weights of {alignment.encoder} are missing: put them at {path}")
    digest = file_sha256(path)
    if digest != alignment.sha256:
        raise ValueError(
            f"{path} has the SHA-256 {digest}, and the training declares {alignment.sha256}; "
            "restore the file, or declare its own"
        )


def _read_judge() -> JudgeEncoder:
    network, _ = load_judge(JUDGE_WEIGHTS)
    assert isinstance(network, ResidualClassifier)
    return JudgeEncoder(network)


def _read_dino(path: Path, grid: int) -> DinoEncoder:
    """Build a DINOv2 whose table of positions timm resamples once for the grid."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    network: Any = timm.create_model(path.stem, num_classes=0, img_size=PATCH * grid)
    try:
        weights, _ = backbones.read_weights(path)
        adapt = partial(checkpoint_filter_fn, model=network)
        backbones.load_judged(network, weights, path.name, adapt)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of {path.stem}: {error}") from None
    return DinoEncoder(network, grid)
