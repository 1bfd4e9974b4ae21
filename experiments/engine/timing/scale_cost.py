"""Parameters and multiply-accumulates of networks that draw an image scale by scale.

Counted on the meta device by the rules of `cost.py`:

    macs_core, macs_torchprofile   one pass over all scales of an image, as in training
    macs_image                     all scales in turn with a cache, unguided, one row
    macs_image_guided              the same with a row of the null label beside it
    macs_decoder                   the tokenizer's decoder, once an image

An image's counts hold the convolutions that the tokenizer makes between scales, and no decoder. Two
networks that share an image have no single pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.scales import ScaleSystem, draw_images
from experiments.engine.specs.spec import Backbone, Cost, Sampler
from experiments.engine.timing.cost import (
    MacCounter,
    count_backbone,
    count_parameters,
    count_pass,
    counting,
)


def count_declared(spec: Cost) -> dict[str, int]:
    """Count what a spec declares, by the kind of its network."""
    if backbones.kind_of(spec.backbone.name) is backbones.Kind.AUTOREGRESSIVE:
        return count_scales(spec)
    return count_backbone(spec)


def count_scales(spec: Cost) -> dict[str, int]:
    """Count an autoregressive network, or the two that share an image.

    Raises:
        ValueError: no tokenizer is declared, or the networks do not fit each other.
    """
    if spec.tokenizer is None:
        raise ValueError(f"{spec.backbone.name} draws tokens: its count needs a tokenizer")
    network: Any = _build(spec, spec.backbone)
    refiner = _build(spec, spec.refiner) if spec.refiner else None
    side = network.sides[-1]
    if side != spec.size:
        raise ValueError(
            f"{spec.backbone.name} ends at {side}x{side} tokens, and not at "
            f"{spec.size}x{spec.size}; declare size={side}"
        )

    # One set of a tokenizer's weights serves any scales, so it takes those of the network.
    tokenizer: Any = _build_tokenizer(spec.tokenizer, network)
    system = ScaleSystem(network, tokenizer, refiner, spec.drafted_scales)
    if refiner is None:
        counts = count_parameters(network) | _count_one_pass(network)
    else:
        counts = count_parameters(nn.ModuleList([network, refiner]))
    counts |= _count_images(system)

    features = torch.empty(1, spec.channels, side, side, device="meta")
    with counting() as macs:
        tokenizer.decode(features)
    return counts | {"macs_decoder": macs.core}


def _build(spec: Cost, backbone: Backbone) -> nn.Module:
    backbones.require_kind(backbone.name, backbones.Kind.AUTOREGRESSIVE)
    options = backbone.options | dict(channels=spec.channels, num_classes=spec.num_classes)
    with torch.device("meta"):
        return backbones.build(backbone.name, **options).eval()


def _build_tokenizer(backbone: Backbone, network: Any) -> nn.Module:
    backbones.require_kind(backbone.name, backbones.Kind.TOKENIZER)
    options = dict(sides=network.sides) | backbone.options
    with torch.device("meta"):
        return backbones.build(backbone.name, **options).eval()


def _count_one_pass(network: Any) -> dict[str, int]:
    """Count the logits of all scales of one image, as a step of training computes them."""
    inputs = torch.empty(1, sum(network.lengths) - 1, network.channels, device="meta")
    with counting() as macs, _one_block_for_all(network, macs):
        network(_label(), inputs)
    return count_pass(macs)


def _count_images(system: ScaleSystem) -> dict[str, int]:
    """Count one image that is drawn scale by scale, unguided and guided."""
    counts = {}
    for name, guidance in (("macs_image", 1.0), ("macs_image_guided", 2.0)):
        sampler = Sampler("scales", len(system.tokenizer.sides), guidance)
        with counting() as macs, ExitStack() as alike:
            for network, _ in system.list_parts():
                alike.enter_context(_one_block_for_all(network, macs))
            draw_images(system, sampler, _label(), _take_likeliest)
        counts[name] = macs.core
    return counts


class _Repeated(nn.Module):
    """Run a block once and count it as often as the network has such blocks."""

    def __init__(self, block: nn.Module, times: int, macs: MacCounter) -> None:
        super().__init__()
        self.block = block
        self.times = times
        self.macs = macs

    def forward(self, *args: Any) -> Any:
        before = self.macs.core, self.macs.extra, self.macs.norms
        out = self.block(*args)
        core, extra, norms = before
        self.macs.core += (self.times - 1) * (self.macs.core - core)
        self.macs.extra += (self.times - 1) * (self.macs.extra - extra)
        self.macs.norms += (self.times - 1) * (self.macs.norms - norms)
        return out


@contextmanager
def _one_block_for_all(network: Any, macs: MacCounter) -> Iterator[None]:
    """Run the first block alone and count it for all: they are alike, and meta tensors are slow."""
    blocks = network.blocks
    assert len({_shapes(block) for block in blocks}) == 1, "the blocks are not alike"
    network.blocks = nn.ModuleList([_Repeated(blocks[0], len(blocks), macs)])
    yield
    network.blocks = blocks


def _shapes(block: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, value.shape) for name, value in block.state_dict().items())


def _take_likeliest(logits: Tensor, scale: int) -> Tensor:
    """Draw without random numbers, which cost no product."""
    return logits.argmax(dim=-1)


def _label() -> Tensor:
    return torch.zeros(1, dtype=torch.long, device="meta")
