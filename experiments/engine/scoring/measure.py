from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy import ndarray

from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import compute_pieces
from experiments.engine.scoring.inception import BATCH, Inception
from experiments.engine.scoring.metrics import Moments

BLOCKS, NEIGHBOURS, KID_SIZE = 10, 3, 1000


LEVELS = 4  # images in [0, 1] or [-1, 1] that are cast to uint8 have 0, 1 and 255


PIECE = 16 * BATCH  # images whose features one rank takes before the next look at the others


class Readable(Protocol):
    """Images that can be read from any place: part(start, stop) -> uint8 (stop - start, H, W, 3)."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> ndarray: ...


@dataclass
class Measured:
    """Features of N images of `size` (H, W) in file order: pool (N, 2048), spatial (N, 2023), class probabilities (N, 1008), all float32."""

    pool: ndarray
    spatial: ndarray
    probabilities: ndarray
    size: tuple[int, int] | None = None


def measure(inception: Inception, batches: Iterable[ndarray]) -> Measured:
    """Features of all images (uint8 (n, H, W, 3) batches); ValueError for no images or fewer than LEVELS levels in all of them."""
    return _joined([_piece(inception, batches)])


def measure_shared(
    inception: Inception,
    images: Readable,
    folder: Path,
    context: RunContext,
) -> Measured | None:
    """The same on the first rank, None on the others, each of which takes its share of the pieces; they wait in `folder` until all are there.

    A piece is whole batches of the network's, so no bit depends on the number of ranks.
    """

    def piece(number: int) -> dict[str, ndarray]:
        return _piece(
            inception, [images.part(number * PIECE, min((number + 1) * PIECE, len(images)))]
        )

    found = list(compute_pieces(context, folder, math.ceil(len(images) / PIECE), piece))
    return _joined(found) if context.group.first else None


def _piece(inception: Inception, batches: Iterable[ndarray]) -> dict[str, ndarray]:
    seen, size = np.zeros(256, bool), (0, 0)

    def watched() -> Iterable[ndarray]:
        nonlocal size
        for batch in batches:
            size = batch.shape[1:3]
            if seen.sum() < LEVELS:  # enough of them are seen within the first batch of real images
                seen[batch] = True
            yield batch

    parts = list(inception.features(watched()))
    if not parts:
        raise ValueError("there are no images to measure")
    pool, spatial, probabilities = (np.concatenate(layer) for layer in zip(*parts, strict=True))
    return {
        "pool": pool,
        "spatial": spatial,
        "probabilities": probabilities,
        "levels": seen,
        "size": np.array(size),
    }


def _joined(pieces: list[dict[str, ndarray]]) -> Measured:
    levels = np.flatnonzero(np.any([piece["levels"] for piece in pieces], axis=0))
    if len(levels) < LEVELS:
        raise ValueError(
            f"{', '.join(map(str, levels))} are all the levels that the images have: were they cast to uint8 before they were scaled to 0..255?"
        )
    height, width = pieces[0]["size"].tolist()
    return Measured(
        *(
            np.concatenate([piece[layer] for piece in pieces])
            for layer in ("pool", "spatial", "probabilities")
        ),
        (height, width),
    )


def blocks_sum(features: ndarray) -> Moments:
    """Statistics of all rows, accumulated in float64 block by block."""
    return reduce(add, blocks(features))


def blocks(features: ndarray, labels: ndarray | None = None) -> list[Moments]:
    """Ten sets of statistics of rows dealt at random; with labels (N,) every class is spread evenly over the ten."""
    n = len(features)
    order = np.lexsort(
        (np.random.default_rng(0).permutation(n), np.zeros(n) if labels is None else labels)
    )
    parts = []
    for j in range(min(BLOCKS, n)):
        part = Moments(features.shape[1])
        part.update(features[np.sort(order[j::BLOCKS])])
        parts.append(part)
    return parts
