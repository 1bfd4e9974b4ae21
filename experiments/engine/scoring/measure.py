"""Features of a set of images, taken by one process or shared by a group of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy import ndarray

from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import Arrays, compute_pieces
from experiments.engine.scoring.inception import BATCH

if TYPE_CHECKING:
    from experiments.engine.judges.dinov2 import Dinov2
    from experiments.engine.scoring.files.repeats import Prints

# Grey levels that real images have at least. Images in [0, 1] or [-1, 1] that are cast to uint8
# have 0, 1 and 255.
MIN_LEVELS = 4
# Images whose features one rank takes before the ranks meet: whole batches of the network.
PIECE = 16 * BATCH


class Extractor(Protocol):
    """What turns images into features, layer by layer."""

    # Digest of the weights, and their name in manifests.
    sha256: str
    name: str
    # What a record must say of the weights.
    warnings: tuple[str, ...]
    # Fields of `Measured`, in the order in which `features` yields them.
    layers: tuple[str, ...]

    def features(self, batches: Iterable[ndarray]) -> Iterator[tuple[ndarray, ...]]:
        """Yield the layers of uint8 images (n, H, W, 3), at most BATCH images at a time."""
        ...


class WithDinov2:
    """An extractor and DINOv2 beside it, which measure the same images in one pass.

    Attributes:
        extractor: gives the usual layers; this object bears its name and digest.
        dinov2: gives the layer `dinov2`.
    """

    def __init__(self, extractor: Extractor, dinov2: Dinov2) -> None:
        self.extractor = extractor
        self.dinov2 = dinov2
        self.sha256 = extractor.sha256
        self.name = extractor.name
        self.warnings = (*extractor.warnings, *dinov2.warnings)
        self.layers = (*extractor.layers, "dinov2")

    def features(self, batches: Iterable[ndarray]) -> Iterator[tuple[ndarray, ...]]:
        """Yield all layers, BATCH images at a time."""
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                images = batch[start : start + BATCH]
                for layers in self.extractor.features([images]):
                    yield *layers, self.dinov2(images)


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
    # DINOv2's class tokens, (N, 1024), where they were taken.
    dinov2: ndarray | None = None

    def take(self, rows: ndarray) -> Measured:
        """Return the features of these rows."""
        return replace(
            self,
            pool=self.pool[rows],
            spatial=self.spatial[rows],
            probabilities=self.probabilities[rows],
            prints=self.prints.take(rows) if self.prints else None,
            dinov2=None if self.dinov2 is None else self.dinov2[rows],
        )


def measure(extractor: Extractor, batches: Iterable[ndarray]) -> Measured:
    """Return the features of all images.

    Args:
        extractor: what measures.
        batches: images, uint8 (n, H, W, 3), in batches of any size.

    Raises:
        ValueError: if there are no images, or if all of them together have fewer than MIN_LEVELS
            grey levels.
    """
    return _join([_measure_piece(extractor, batches)])


def measure_shared(
    extractor: Extractor,
    images: Readable,
    folder: Path,
    context: RunContext,
) -> Measured | None:
    """Return the features on the first rank and None on the others, which take their share.

    A piece is whole batches of the network, so no bit depends on the number of ranks.

    Args:
        extractor: what measures.
        images: what is measured.
        folder: where the pieces wait until all are there; the caller removes it.
        context: whose group shares the work.
    """

    def measure_piece(number: int) -> Arrays:
        stop = min((number + 1) * PIECE, len(images))
        return _measure_piece(extractor, [images.read(number * PIECE, stop)])

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


def _measure_piece(extractor: Extractor, batches: Iterable[ndarray]) -> Arrays:
    """Return the layers of some images, and what their check needs, as arrays."""
    watcher = _Watcher()
    batch_features = list(extractor.features(watcher.watch(batches)))
    if not batch_features:
        raise ValueError("there are no images to measure")
    layers = [np.concatenate(layer) for layer in zip(*batch_features, strict=True)]
    return dict(zip(extractor.layers, layers, strict=True)) | {
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
    layers = {
        name: np.concatenate([piece[name] for piece in pieces])
        for name in pieces[0].keys() - {"levels", "size"}
    }
    return Measured(
        layers["pool"],
        layers["spatial"],
        layers["probabilities"],
        (height, width),
        dinov2=layers.get("dinov2"),
    )
