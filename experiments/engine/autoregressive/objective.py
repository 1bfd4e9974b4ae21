"""VAR's training: the cross-entropy of every token, given what coarser scales of the image make.

Source: arXiv:2404.02905 and github.com/FoundationVision/VAR at 78b9539. All tokens of all scales
weigh the same.

Legend: N images, L tokens of all scales.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.scales import check_tokenizer
from experiments.engine.specs.spec import Diffusion, Train


class NextScale:
    """The losses of a network that predicts a frozen tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what the losses call: the network.

        Raises:
            ValueError: its tokens are not the tokenizer's.
        """
        check_tokenizer(network, self.tokenizer)
        return network

    def losses(self, model: Any, tokens: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Compute 'loss', the mean over the tokens of an image, (N,), and 'tokens', (N, L).

        Args:
            model: the network.
            tokens: of the images (N, L).
            y: labels (N,).
        """
        with torch.no_grad():
            inputs = self.tokenizer.inputs(tokens)  # (N, L - 1, C)
        logits = model(y, inputs)  # (N, L, V)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        losses = losses.view(tokens.shape)
        return {"loss": losses.mean(dim=1), "tokens": losses}


def check_objective(spec: Train) -> None:
    """Check that a training predicts tokens if and only if its network does.

    Raises:
        ValueError: it lacks a tokenizer, or declares what no network that predicts tokens has.
    """
    name = spec.backbone.name
    if spec.tokenizer is None:
        refuse_autoregressive(name)
        return
    backbones.require_kind(name, backbones.Kind.AUTOREGRESSIVE)

    # What belongs to images with noise.
    foreign = {
        "diffusion": spec.diffusion != Diffusion(),
        "alignment": spec.alignment is not None,
        "distillation": spec.distillation is not None,
        "flip of its data": spec.data.flip,
        "captions of its data": bool(spec.data.captions),
    }
    if declared := [field for field, is_there in foreign.items() if is_there]:
        raise ValueError(
            f"{name} predicts tokens of images as they are: leave out {', '.join(declared)}"
        )


def refuse_autoregressive(name: str) -> None:
    """Raise ValueError if a registered network predicts tokens, which diffusion must not meet."""
    if backbones.kind_of(name) is backbones.Kind.AUTOREGRESSIVE:
        raise ValueError(
            f"{name} predicts tokens, which no diffusion trains or samples; declare a training "
            "with a tokenizer"
        )
