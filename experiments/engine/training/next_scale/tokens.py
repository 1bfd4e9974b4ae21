"""The tokens that an autoregressive network is trained on, made by its training's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.engine.autoregressive.tokenizer import Trained, cached_tokenizer, encode_tokens
from experiments.engine.data.sets import AnySet, ImageSet, load
from experiments.engine.specs.spec import Train

FOLDER = "tokenizers"  # beside the runs, where a machine keeps those that it has trained


def load_tokenizer(spec: Train, runs: Path, device: torch.device) -> Trained:
    """Return the tokenizer of a training, which the first call on a machine trains.

    Args:
        spec: of the training; its images train the tokenizer too.
        runs: folder of the runs.
        device: where the tokenizer goes.

    Raises:
        ValueError: the data are no images, or of another size than the tokenizer's.
    """
    assert spec.tokenizer is not None, "the training declares a tokenizer"
    images, _ = take_images(load(spec.data))
    trained = cached_tokenizer(spec.tokenizer, images, runs / FOLDER)
    return trained._replace(network=trained.network.to(device))


def take_images(images: AnySet) -> tuple[Tensor, Tensor]:
    """Return all images (M, C, H, W) and labels (M,) of a set; ValueError if it has no images."""
    if not isinstance(images, ImageSet):
        raise ValueError(
            "a tokenizer makes tokens of images, and the set holds latents or captioned images; "
            "declare a set of images"
        )
    return images.take(torch.arange(len(images)))


class TokenSet(ImageSet):
    """The tokens of a set's images, in its order."""

    def __init__(self, tokens: Tensor, labels: Tensor, identity: dict[str, Any]) -> None:
        """Wrap tokens (M, L) and labels (M,), with what identifies them in records."""
        self.tokens = tokens
        self.images = tokens.numpy()
        self.labels = labels.numpy()
        self.flip = False
        self.identity = identity

    def take(
        self, indices: Tensor, seed: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read tokens (N, L) and labels (N,) at these indices; nothing else changes them."""
        return self.tokens[indices], torch.from_numpy(self.labels[indices.numpy()])


def encode_set(images: AnySet, trained: Trained, device: torch.device) -> TokenSet:
    """Encode every image of a set once; ValueError if it has none."""
    pixels, labels = take_images(images)
    tokens = encode_tokens(trained.network, pixels.to(device)).cpu()
    return TokenSet(tokens, labels, images.identity | trained.identity)
