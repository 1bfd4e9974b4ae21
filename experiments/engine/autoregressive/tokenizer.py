"""Tokenizers of small images, each trained once per machine, deterministically, and cached.

A tokenizer learns to make images of their own tokens: mean squared error beside the quantisation's
own loss, by Adam with cosine decay. Codes that no image uses take the place of vectors that some
scale has to code.

Legend: M images, C channels of a code, V codes, P side of the last scale.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.records.files import locked, written_whole
from experiments.engine.specs.form import canonical
from experiments.engine.specs.spec import Tokenizer

# The share of the steps after which no code is drawn anew, so that the codes can settle.
REVIVAL = 0.8
# Images whose codes are looked at, and images that are encoded at a time.
SEEN = 256
BATCH = 250


class Trained(NamedTuple):
    """A trained tokenizer.

    network: it, frozen and in eval mode.
    identity: SHA-256 of its weights, and mean squared error of the images that it was trained on.
    """

    network: Any
    identity: dict[str, Any]


def cached_tokenizer(spec: Tokenizer, images: Tensor, cache: Path) -> Trained:
    """Return a tokenizer from the cache, or train it and keep it there.

    Args:
        spec: the tokenizer, and how it is trained.
        images: what it is trained on (M, C, H, W).
        cache: folder of the weights. Images, declaration, network and torch version name the file,
            so nothing stale is ever read.

    Raises:
        ValueError: it is no tokenizer, or one of other images.
    """
    from safetensors.torch import save

    backbones.require_kind(spec.backbone.name, backbones.Kind.TOKENIZER)
    network: Any = _build(spec)
    check_images(network, images.shape)
    pixels = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    content = (pixels, canonical(spec, full=True), str(network), torch.__version__)
    path = cache / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.safetensors"

    # Other processes wait here while one trains.
    with locked(cache / "tokenizers.lock"):
        if not path.exists():
            weights = save(_train(spec, images).state_dict())
            with written_whole(path) as file:
                file.write(weights)

    # The error is that of the stored weights.
    backbones.load_published(network, path, warn=backbones.print_warning)
    network.eval().requires_grad_(False)
    identity = {
        "tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "tokenizer_mse": reconstruction_error(network, images),
    }
    return Trained(network, identity)


def check_images(tokenizer: Any, shape: torch.Size) -> None:
    """Raise ValueError unless a tokenizer takes images of a shape (M, C, H, W)."""
    size = tokenizer.input_size
    expected = (tokenizer.image_channels, size, size)
    if tuple(shape[1:]) != expected:
        raise ValueError(
            f"the tokenizer takes images of {' x '.join(map(str, expected))}, and the set has "
            f"{' x '.join(map(str, shape[1:]))}; declare other sides, multipliers or channels"
        )


@torch.no_grad()
def encode_tokens(tokenizer: Any, images: Tensor) -> Tensor:
    """Return the tokens (M, L) of all scales of images (M, C, H, W)."""
    parts = [tokenizer.quantise(tokenizer.encode(part)).tokens for part in images.split(BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_error(tokenizer: Any, images: Tensor) -> float:
    """Return the mean squared error of images (M, C, H, W) that are made of their own tokens."""
    errors = []
    for part in images.split(BATCH):
        features = tokenizer.quantise(tokenizer.encode(part)).features
        errors.append((tokenizer.decode(features) - part).square().flatten(1).mean(1))
    return torch.cat(errors).double().mean().item()


def _build(spec: Tokenizer) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("tokenizer"))
        return backbones.build(spec.backbone.name, **spec.backbone.options)


def _train(spec: Tokenizer, images: Tensor) -> nn.Module:
    """Train a tokenizer on one thread, so that every run gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = _build(spec)
        optimizer = torch.optim.Adam(tokenizer.parameters(), spec.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.steps)
        for step in range(spec.steps):
            draw = generator_at("tokenizer batch", step)
            if step % spec.revive_every == 0 and step < REVIVAL * spec.steps:
                _revive(tokenizer, _choose(images, SEEN, draw), draw)

            # One step on the loss of images and of codes.
            x = _choose(images, spec.batch, draw)
            reconstruction, loss = tokenizer(x)
            optimizer.zero_grad()
            (F.mse_loss(reconstruction, x) + loss).backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return tokenizer


def _choose(images: Tensor, num: int, draw: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (num,), generator=draw)]


@torch.no_grad()
def _revive(tokenizer: Any, images: Tensor, draw: torch.Generator) -> None:
    """Draw the codes that no image uses from the vectors that the scales have to code."""
    rest, side = tokenizer.encode(images), tokenizer.sides[-1]
    vectors, used = [], []
    for scale, own in enumerate(tokenizer.sides):
        z = rest if own == side else F.interpolate(rest, (own, own), mode="area")
        vectors.append(z.permute(0, 2, 3, 1).reshape(-1, tokenizer.channels)[:SEEN])
        tokens = tokenizer.quantize.nearest(z.permute(0, 2, 3, 1).reshape(-1, tokenizer.channels))
        used.append(tokens)
        rest = rest - tokenizer.contribution(scale, tokens.view(len(images), -1))

    # Every scale offers as many vectors.
    offered = torch.cat(vectors)
    counts = torch.bincount(torch.cat(used), minlength=tokenizer.vocabulary)
    unused = (counts == 0).nonzero()[:, 0]
    chosen = torch.randint(len(offered), (len(unused),), generator=draw)
    tokenizer.quantize.embedding.weight[unused] = offered[chosen]
