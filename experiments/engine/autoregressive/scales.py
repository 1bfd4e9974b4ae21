"""Draw images scale by scale: VAR's sampler, and CoDe's, in which a second network takes over.

Sources: arXiv:2404.02905 and FoundationVision/VAR at 78b9539; arXiv:2411.17787 and czg1225/CoDe at
bfb204d. The guidance rises linearly from none at the first scale. Logits are guided, cut to the
largest ones, cut to the most probable ones, and divided by a temperature, in this order.

Legend: N images, R rows (N, or 2N with null labels), S scales, l tokens of a scale, C channels of a
code, V codes, P side of the last scale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Sampler

# Draws tokens (N, l) of a scale from logits (N, l, V), of which those at minus infinity are out.
Draw = Callable[[Tensor, int], Tensor]
# Networks are used as `backbones` describes their kinds: autoregressive ones and tokenizers.
Network = Any
T = TypeVar("T", int, float)


class ScaleSystem(nn.Module):
    """The networks that draw an image, with the tokenizer that makes it of their tokens."""

    def __init__(
        self,
        network: Network,
        tokenizer: Network,
        refiner: Network | None = None,
        drafted_scales: int = 0,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """Check that the networks fit each other.

        Args:
            network: draws all scales, or the first ones.
            tokenizer: of the networks' tokens.
            refiner: draws the scales after the first `drafted_scales`; None: the network draws all.
            drafted_scales: number of the first network's scales.
            identity: what records say of the tokenizer.

        Raises:
            ValueError: for another vocabulary, other scales, or drafted scales out of range.
        """
        super().__init__()
        for drawing in (network, refiner):
            if drawing is not None:
                check_tokenizer(drawing, tokenizer)
        if refiner is not None:
            check_drafted(drafted_scales, len(tokenizer.sides))
        self.network = network
        self.tokenizer = tokenizer
        self.refiner = refiner
        self.drafted_scales = drafted_scales
        self.identity = identity or {}

    def list_parts(self) -> list[tuple[Network, int]]:
        """Return the networks in turn, each with the scale at which it stops."""
        last = len(self.tokenizer.sides)
        if self.refiner is None:
            return [(self.network, last)]
        return [(self.network, self.drafted_scales), (self.refiner, last)]


@dataclass
class Drawing:
    """A batch of images as far as they are drawn."""

    # Sum of what the tokens so far add (N, C, P, P).
    features: Tensor
    # Tokens of each scale (N, l).
    tokens: list[Tensor] = field(default_factory=list)
    # What a network sees of each scale after the first, (N, l, C), the next scale's included.
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def all_inputs(self) -> Tensor:
        """Return the inputs of all scales in one row of tokens."""
        batch, channels = self.features.shape[:2]
        return torch.cat([self.features.new_zeros(batch, 0, channels), *self.inputs], dim=1)


class RaceDraw:
    """Draw tokens with noise that depends on an image's seed and on the scale alone.

    The token with the largest ratio of its probability to an exponential number wins.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        # From pinned memory the GPU takes the noise without a stop of the host.
        noise = torch.empty(logits.shape, pin_memory=logits.is_cuda)
        for image, seed in zip(noise, self.seeds, strict=True):
            image.exponential_(generator=generator_at("tokens", seed, scale))
        return (logits.softmax(dim=-1) / noise.to(logits.device, non_blocking=True)).argmax(dim=-1)


def draw_images(system: ScaleSystem, sampler: Sampler, y: Tensor, draw: Draw) -> Drawing:
    """Draw all scales of a batch of images; see `draw_scales`."""
    return deque(draw_scales(system, sampler, y, draw), maxlen=1).pop()


def draw_scales(system: ScaleSystem, sampler: Sampler, y: Tensor, draw: Draw) -> Iterator[Drawing]:
    """Draw a batch of images, and yield the same drawing after each scale.

    A network that takes over sees all scales so far in its first pass.

    Args:
        system: what draws.
        sampler: guidance scale, top-k, top-p and temperatures.
        y: labels (N,).
        draw: chooses tokens.

    Raises:
        ValueError: options of the sampler that fit no scales.
    """
    tokenizer = system.tokenizer
    check_sampler(sampler, len(tokenizer.sides))
    side, weight = tokenizer.sides[-1], next(tokenizer.parameters())
    drawing = Drawing(weight.new_zeros(len(y), tokenizer.channels, side, side))
    for network, stop in system.list_parts():
        yield from _extend(drawing, network, tokenizer, _Choice(sampler, y, network, draw), stop)


class _Choice:
    """How one network chooses the tokens of a scale."""

    def __init__(self, sampler: Sampler, y: Tensor, network: Network, draw: Draw) -> None:
        self.sampler = sampler
        self.draw = draw
        self.last = max(len(network.sides) - 1, 1)
        # Without guidance no null labels are run.
        self.rows = y if sampler.scale == 1 else torch.cat([y, y.new_full(y.shape, _null(network))])

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """Return tokens (N, l) of a scale from logits (R, l, V)."""
        if self.sampler.scale != 1:
            weight = (self.sampler.scale - 1) * scale / self.last
            conditional, null = logits.chunk(2)
            logits = (1 + weight) * conditional - weight * null
        logits = keep_likely(logits, at_scale(self.sampler.top_k, scale, 0), self.sampler.top_p)
        return self.draw(logits / at_scale(self.sampler.temperatures, scale, 1.0), scale)


def _extend(
    drawing: Drawing, network: Network, tokenizer: Network, choose: _Choice, stop: int
) -> Iterator[Drawing]:
    """Draw the scales up to `stop` by one network, with a cache of its own."""
    cache = network.new_cache()
    x = network.embed(choose.rows, drawing.all_inputs)
    for scale in range(len(drawing.tokens), stop):
        # Of several scales at once, only the last one is new.
        logits = network.step(x, choose.rows, cache)[:, -tokenizer.lengths[scale] :]
        tokens = choose(logits, scale)
        drawing.tokens.append(tokens)
        drawing.features = drawing.features + tokenizer.contribution(scale, tokens)

        # The next scale sees the sum of all scales so far. As in CoDe's code, a network that stops
        # here has embedded it too.
        if scale + 1 < len(tokenizer.sides):
            drawing.inputs.append(tokenizer.next_input(drawing.features, scale + 1))
            x = network.embed(choose.rows, drawing.inputs[-1], cache.num_tokens)
        yield drawing


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set unlikely logits (..., V) to minus infinity.

    Args:
        logits: of any shape, over codes at last.
        top_k: how many of the largest stay, and all that equal the least of them; 0: all.
        top_p: the rest of the least likely ones may have a probability of 1 - top_p together, among
            what top-k left; the largest stays. 0: all stay.
    """
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p > 0:
        rising, order = logits.sort(dim=-1)
        out = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        out[..., -1] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return logits


def at_scale(values: tuple[T, ...], scale: int, default: T) -> T:
    """Return an option of a scale: the only value holds for all, and no value is the default."""
    if not values:
        return default
    return values[0] if len(values) == 1 else values[scale]


# ---- Refusals


def check_drafted(drafted_scales: int, scales: int) -> None:
    """Raise ValueError unless both networks of CoDe have a scale to draw."""
    if not 1 <= drafted_scales < scales:
        raise ValueError(
            f"CoDe's first network drafts 1 to {scales - 1} of {scales} scales, got "
            f"{drafted_scales}"
        )


def check_sampler(sampler: Sampler, scales: int) -> None:
    """Raise ValueError unless options are in range and fit the number of scales."""
    # An option is one number, or one for each scale.
    for name in ("top_k", "temperatures"):
        values = getattr(sampler, name)
        if len(values) not in (0, 1, scales):
            raise ValueError(
                f"{name} takes one number for all scales, or one for each of {scales}, got "
                f"{len(values)}"
            )

    # Its numbers must make a distribution.
    if min(sampler.top_k, default=0) < 0 or min(sampler.temperatures, default=1.0) <= 0:
        raise ValueError(
            f"top_k must be at least 0 and temperatures above 0, got {sampler.top_k} and "
            f"{sampler.temperatures}"
        )
    if not 0 <= sampler.top_p <= 1:
        raise ValueError(f"top_p must be from 0 to 1, got {sampler.top_p}")


def check_tokenizer(network: Network, tokenizer: Network) -> None:
    """Raise ValueError unless a network's tokens are the tokenizer's."""
    for name, meaning in (
        ("vocabulary", "codes"),
        ("channels", "channels of a code"),
        ("sides", "sides of scales"),
    ):
        drawn, known = getattr(network, name), getattr(tokenizer, name)
        if drawn != known:
            raise ValueError(
                f"the network has {drawn} {meaning} and the tokenizer {known}; "
                "give the tokenizer that the network was trained with"
            )


def _null(network: Network) -> int:
    """Return the null label."""
    return int(network.num_classes)
