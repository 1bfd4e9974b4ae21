"""Inception features of a set of images, taken by one process or shared by a group of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy import ndarray

from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import Arrays, compute_pieces
from experiments.engine.scoring.inception import BATCH, Inception

if TYPE_CHECKING:
    from experiments.engine.scoring.files.repeats import Prints

# Grey levels that real images have at least. Images in [0, 1] or [-1, 1] that are cast to uint8
# have 0, 1 and 255.
MIN_LEVELS = 4
# Images whose features one rank takes before the ranks meet: whole batches of the network.
PIECE = 16 * BATCH
LAYERS = ("pool", "spatial", "probabilities")


class Readable(Protocol):
    """Images that can be read from any place."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> ndarray:
        """Return images start to stop - 1, uint8 (stop - start, H, W, 3)."""
        ...


@dataclass
class Measured:
    """Features of N images in file order, float32."""

    # Inception's last pooling, (N, 2048).
    pool: ndarray
    # Seven channels of a 17 x 17 map, (N, 2023).
    spatial: ndarray
    # Class probabilities, (N, 1008).
    probabilities: ndarray
    # Height and width of the images, where they are known.
    size: tuple[int, int] | None = None
    # What tells the images apart, where that was taken.
    prints: Prints | None = None

    def take(self, rows: ndarray) -> Measured:
        """Return the features of these rows."""
        prints = self.prints.take(rows) if self.prints else None
        pool, spatial, probabilities = (getattr(self, layer)[rows] for layer in LAYERS)
        return Measured(pool, spatial, probabilities, self.size, prints)


def measure(inception: Inception, batches: Iterable[ndarray]) -> Measured:
    """Return the features of all images.

    Args:
        inception: the network.
        batches: images, uint8 (n, H, W, 3), in batches of any size.

    Raises:
        ValueError: if there are no images, or if all of them together have fewer than MIN_LEVELS
            grey levels.
    """
    return _join([_measure_piece(inception, batches)])


def measure_shared(
    inception: Inception,
    images: Readable,
    folder: Path,
    context: RunContext,
) -> Measured | None:
    """Return the features on the first rank and None on the others, which take their share.

    A piece is whole batches of the network, so no bit depends on the number of ranks.

    Args:
        inception: the network.
        images: what is measured.
        folder: where the pieces wait until all are there; the caller removes it.
        context: whose group shares the work.
    """

    def measure_piece(number: int) -> Arrays:
        stop = min((number + 1) * PIECE, len(images))
        return _measure_piece(inception, [images.read(number * PIECE, stop)])

    num_pieces = math.ceil(len(images) / PIECE)
    pieces = list(compute_pieces(context, folder, num_pieces, measure_piece))
    return _join(pieces) if context.group.first else None


class _Watcher:
    """Notes the size and the grey levels of the images that pass."""

    def __init__(self) -> None:
        self.levels = np.zeros(256, bool)
        self.size = (0, 0)

    def watch(self, batches: Iterable[ndarray]) -> Iterator[ndarray]:
        for batch in batches:
            self.size = batch.shape[1:3]
            # The first batch of real images shows enough levels; later ones cost nothing.
            if self.levels.sum() < MIN_LEVELS:
                self.levels[batch] = True
            yield batch


def _measure_piece(inception: Inception, batches: Iterable[ndarray]) -> Arrays:
    """Return the layers of some images, and what their check needs, as arrays."""
    watcher = _Watcher()
    batch_features = list(inception.features(watcher.watch(batches)))
    if not batch_features:
        raise ValueError("there are no images to measure")
    layers = [np.concatenate(layer) for layer in zip(*batch_features, strict=True)]
    return dict(zip(LAYERS, layers, strict=True)) | {
        "levels": watcher.levels,
        "size": np.array(watcher.size),
    }


def _join(pieces: list[Arrays]) -> Measured:
    levels = np.flatnonzero(np.any([piece["levels"] for piece in pieces], axis=0))
    if len(levels) < MIN_LEVELS:
        raise ValueError(
            f"{', '.join(map(str, levels))} are all the levels that the images have: "
            "were they cast to uint8 before they were scaled to 0..255?"
        )
    height, width = pieces[0]["size"].tolist()
    pool, spatial, probabilities = (
        np.concatenate([piece[layer] for piece in pieces]) for layer in LAYERS
    )
    return Measured(pool, spatial, probabilities, (height, width))
