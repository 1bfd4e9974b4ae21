"""Measure from which places of the image each token of a caption is read, layer by layer.

A layer of cross-attention weighs the L tokens of a caption at every place of its grid. Seen from a
token, these weights are a map over the image. The map of a digit's word is compared with the cell
in which the caption puts the digit, and with the cell of the other digit.

N images, one a caption, h heads, L tokens, T = H W places of a layer's grid, K named digits of all
captions together, A captions whose maps are kept, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.probes import implied
from analysis.probes.declared import Tokens
from analysis.probes.implied import Weights
from analysis.probes.layers import arguments_of
from analysis.probes.watch import Call, Layer, Operation, watching
from backbones import dico_text, text_unet
from experiments.engine.data.captioned import grammar

READERS = (dico_text.CrossAttention, text_unet.TextAttention)


def text_layers(model: nn.Module) -> list[Layer]:
    """Return the layers in which places of the image attend to the tokens of a caption.

    Raises:
        ValueError: There is none.
    """
    layers = [
        Layer(name, module, _read_text)
        for name, module in model.named_modules()
        if isinstance(module, READERS)
    ]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention to its caption; probe DiCo-CrossAttn "
            "or a U-Net that reads text"
        )
    return layers


def _read_text(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    """Read the weights of places over all tokens of the text."""
    ((q, k, bias, scale),) = arguments_of(operations, "attention")
    tokens = torch.arange(k.shape[2], device=k.device)
    return implied.Softmax(q, k, place, bias, scale, keys=tokens)


@dataclass(frozen=True)
class Named:
    """A digit that a caption names."""

    # The image of the caption, and the place of the digit's word among its tokens.
    image: int
    token: int
    # The row and column of its cell on the canvas, and those of the other digit's.
    corner: tuple[int, int]
    other: tuple[int, int] | None
    # What the caption is to a training.
    group: str


def named_digits(captions: tuple[grammar.Caption, ...]) -> list[Named]:
    """Return the digits that captions name, caption by caption in the order of their words."""
    named = []
    for image, caption in enumerate(captions):
        # The begin stands before the words.
        words = caption.text.split()
        places = [1 + place for place, word in enumerate(words) if word in grammar.DIGITS]
        for number, (token, corner) in enumerate(zip(places, caption.corners, strict=True)):
            others = [at for place, at in enumerate(caption.corners) if place != number]
            other = others[0] if others else None
            named.append(Named(image, token, corner, other, caption.group.value))
    return named


def cell_mask(grid: tuple[int, int], corner: tuple[int, int] | None) -> Tensor:
    """Return which share of each place of a grid lies in a cell of the canvas, (H, W).

    A place stands for a rectangle of pixels. Without a cell all shares are nan.
    """
    if corner is None:
        return torch.full(grid, torch.nan)
    inside = []
    for length, start in zip(grid, corner, strict=True):
        # Of each row or column, the part that lies in the cell.
        edges = torch.arange(length + 1) * (grammar.SIZE / length)
        inside.append(edges.clamp(start, start + grammar.CELL).diff() * length / grammar.SIZE)
    return inside[0][:, None] * inside[1]


def share_of_cells(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map (K, H, W) that lies in its own cell, by masks (K, H, W): (K,).

    Raises:
        ValueError: A token has no weight at any place.
    """
    total = maps.sum((1, 2))
    if not bool((total > 0).all()):
        raise ValueError(
            "a word has no weight at any place; the network's weights are untrained, diverged or "
            "of another network"
        )
    return (maps * masks).sum((1, 2)) / total


@dataclass
class LayerMaps:
    """What was measured of one layer."""

    grid: tuple[int, int]
    # The cells of the named digits, and those of the digits beside them, (K, H, W).
    cells: Tensor
    others: Tensor
    # Of every step: the share of a digit's map in its own cell (K,) and in the other one (K,), and
    # the mean weight of each token (L,).
    own: list[Tensor] = field(default_factory=list)
    other: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    # Sum over the steps of the maps that are kept, (A, L, H, W).
    kept: Tensor | None = None


class TokensProbe:
    """A network (x, t, y) -> prediction whose cross-attention is measured while it runs."""

    def __init__(
        self, model: nn.Module, captions: tuple[grammar.Caption, ...], shown: list[int]
    ) -> None:
        self.model = model
        self.watched = text_layers(model)
        self.named = named_digits(captions)
        self.shown = shown
        self.layers: dict[str, LayerMaps] = {}
        self.timesteps: list[float] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.timesteps.append(float(t[0]))
        with watching(self.watched, self._measure):
            prediction: Tensor = self.model(x, t, y)
        return prediction

    def _measure(self, call: Call) -> None:
        """Add the maps of a call, as means over the heads."""
        assert call.weights is not None, call.name
        places = torch.arange(call.grid[0] * call.grid[1], device=call.place.device)
        rows = [call.weights.rows(head, places) for head in range(call.weights.heads)]
        maps = torch.stack(rows).mean(0).mT.unflatten(2, call.grid)  # (N, L, H, W)

        # The maps of the digits' words, beside the cells of a grid of this size.
        if call.name not in self.layers:
            cells, others = (
                torch.stack([cell_mask(call.grid, corner) for corner in corners])
                for corners in zip(*((each.corner, each.other) for each in self.named), strict=True)
            )
            self.layers[call.name] = LayerMaps(call.grid, cells, others)
        layer = self.layers[call.name]
        images = [digit.image for digit in self.named]
        seen = maps[images, [digit.token for digit in self.named]].cpu()  # (K, H, W)
        layer.own.append(share_of_cells(seen, layer.cells))
        layer.other.append(share_of_cells(seen, layer.others))
        layer.weight.append(maps.mean((0, 2, 3)).cpu())
        kept = maps[self.shown].cpu()
        layer.kept = kept if layer.kept is None else layer.kept + kept

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is kept beside the record."""
        arrays: dict[str, np.ndarray] = {
            "timesteps": np.array(self.timesteps, np.float32),
            "groups": np.array([digit.group for digit in self.named]),
            "shown": np.array(self.shown),
        }
        for number, (name, layer) in enumerate(self.layers.items()):
            assert layer.kept is not None, name
            arrays |= {
                f"layer_{number}": np.array(name),
                f"grid_{number}": np.array(layer.grid),
                f"own_{number}": torch.stack(layer.own).float().numpy(),
                f"other_{number}": torch.stack(layer.other).float().numpy(),
                f"weight_{number}": torch.stack(layer.weight).float().numpy(),
                f"maps_{number}": (layer.kept / len(layer.own)).half().numpy(),
            }
        return arrays


def summarise(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the scalars of a record: how much of digits' maps lies in cells, by layer and in all.

    `own` and `other` are means over steps and over the digits of pairs, whose uniform value is the
    cell's share of the canvas. `right` is the share of digits whose own cell holds more of the map
    than the other one, in the mean over steps; a guess has a half.
    """
    count = sum(name.startswith("layer_") for name in arrays)
    pairs = arrays["groups"] != grammar.Group.SINGLE.value
    by_layer, owns, others = {}, [], []
    for number in range(count):
        own = arrays[f"own_{number}"][:, pairs].mean(0)
        other = arrays[f"other_{number}"][:, pairs].mean(0)
        owns.append(own)
        others.append(other)
        by_layer[str(arrays[f"layer_{number}"])] = _figures(own, other)

    # Of all layers together, maps are averaged before cells are compared.
    whole = _figures(np.mean(owns, 0), np.mean(others, 0))
    held_out = arrays["groups"][pairs] == grammar.Group.HELD_OUT.value
    if held_out.any():
        unseen = _figures(np.mean(owns, 0)[held_out], np.mean(others, 0)[held_out])
        whole |= {f"{name}_held_out": value for name, value in unseen.items()}
    uniform = (grammar.CELL / grammar.SIZE) ** 2
    return whole | {"uniform": uniform, "layers": by_layer}


def _figures(own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        "own": round(float(own.mean()), 5),
        "other": round(float(other.mean()), 5),
        "right": round(float((own > other).mean()), 5),
    }


def probe(
    model: nn.Module, spec: Tokens, walk: Callable[[TokensProbe], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the summary of a network on the way that `walk` takes it.

    Raises:
        ValueError: The captions place no digits, none of them names two, or the network has no
            cross-attention.
    """
    data = spec.train.data
    if data.name not in grammar.NAMES:
        raise ValueError(
            f"this probe reads captions that place digits ({', '.join(grammar.NAMES)}), and "
            f"{data.name} has none; choose --protocol {grammar.NAME}"
        )
    captions = grammar.captions_of(data.name)[: spec.images]
    if spec.images > data.num_classes or len(captions[-1].digits) < 2:
        raise ValueError(
            f"a caption is probed once, and the first ten name one digit: --images takes 11 to "
            f"{data.num_classes}, not {spec.images}"
        )
    wrapped = TokensProbe(model, captions, [each for each in spec.shown if each < spec.images])
    walk(wrapped)
    arrays = wrapped.arrays()
    return arrays, summarise(arrays)
