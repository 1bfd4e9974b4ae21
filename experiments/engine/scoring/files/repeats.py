"""Repeated images and near copies, found by what images look like and by no network.

Two images are equal if all their levels are. They are near copies if they are not equal and the
means of a grid of at most 16 x 16 cells differ by at most 4 of 255 levels, root mean square: noise,
a lossy format and a pixel here and there change less, another image changes more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.engine.scoring.neighbours import BLOCK, distance_blocks

CELLS = 16  # cells of the grid along a side; a smaller image keeps its pixels
NEAR = 4.0  # levels
RULE = f"means of {CELLS} x {CELLS} cells within {NEAR:g} levels, root mean square"


@dataclass(frozen=True)
class Prints:
    """What tells N images apart.

    digests: first 32 digits of the SHA-256 of each image's levels, (N,).
    thumbnails: means of the grid's cells, (N, d), float32.
    """

    digests: ndarray
    thumbnails: ndarray

    def __len__(self) -> int:
        return len(self.digests)

    def order(self) -> ndarray:
        """Return the rows (N,) in the order of their content, which no order of files changes."""
        return np.argsort(self.digests, kind="stable")

    def take(self, rows: ndarray) -> Prints:
        return Prints(self.digests[rows], self.thumbnails[rows])

    def digest(self, size: tuple[int, int]) -> str:
        """Return the SHA-256 of all images of this height and width, whatever their order."""
        total = hashlib.sha256(f"{size[0]} x {size[1]}".encode())
        total.update(self.digests[self.order()].tobytes())
        return total.hexdigest()


def take_prints(batches: Iterable[ndarray]) -> Prints:
    """Return the prints of all images.

    Args:
        batches: images, uint8 (n, H, W, 3), all of one size.
    """
    digests: list[str] = []
    thumbnails = []
    for batch in batches:
        digests += (hashlib.sha256(image.tobytes()).hexdigest()[:32] for image in batch)
        thumbnails.append(_shrink(batch))
    if not digests:
        raise ValueError("there are no images to measure")
    return Prints(np.array(digests, "S32"), np.concatenate(thumbnails))


def count_repeats(samples: Prints, reference: Prints | None) -> dict[str, Any]:
    """Return how many samples repeat one another, and how many the reference.

    Returns:
        `repeated`: samples beyond the first of each group of equal ones.
        `near_copies`: samples that are near copies of another sample.
        `in_reference`, `near_reference`: the same against the reference's images, if it has some.
    """
    unique, counts = np.unique(samples.digests, return_counts=True)
    counted = {
        "repeated": len(samples) - len(unique),
        "near_copies": _count_near(samples, samples),
    }
    if reference is not None and reference.thumbnails.shape[1] == samples.thumbnails.shape[1]:
        equal = np.isin(unique, reference.digests)
        counted["in_reference"] = int(counts[equal].sum())
        counted["near_reference"] = _count_near(samples, reference)
    return counted


def repeats(counted: dict[str, Any]) -> bool:
    """Tell whether samples repeat, so that they are not independent."""
    return bool(counted["repeated"] or counted["near_copies"])


def repeat_warnings(counted: dict[str, Any], num: int) -> list[str]:
    """Say in sentences what was counted of `num` samples."""
    warnings = []
    if repeats(counted):
        warnings.append(
            f"{counted['repeated']} of {num} samples repeat another one and "
            f"{counted['near_copies']} are near copies of another one: the errors, which assume "
            "independent samples, are withheld"
        )
    if counted.get("in_reference") or counted.get("near_reference"):
        warnings.append(
            f"{counted['in_reference']} of {num} samples equal an image of the reference and "
            f"{counted['near_reference']} are near copies of one"
        )
    return warnings


def _shrink(batch: ndarray) -> ndarray:
    """Return the means of the grid's cells, (n, H, W, 3) -> (n, d)."""
    means = batch.astype(np.float64)
    for axis in (1, 2):
        side = batch.shape[axis]
        if side > CELLS:
            edges = np.arange(CELLS) * side // CELLS
            widths = np.diff([*edges, side])
            shape = [1] * 4
            shape[axis] = CELLS
            means = np.add.reduceat(means, edges, axis) / widths.reshape(shape)
    return means.reshape(len(batch), -1).astype(np.float32)


def _count_near(samples: Prints, others: Prints) -> int:
    """Return how many samples have another image among the others that is near and not equal."""
    # Equal images are compared once; cell means are compared about the middle level.
    (fake, counts), (real, _) = (_distinct(prints) for prints in (samples, others))
    rows, columns = (torch.from_numpy(prints.thumbnails).double() - 128 for prints in (fake, real))
    limit = NEAR**2 * rows.shape[1]
    _, numbers = np.unique(np.concatenate([fake.digests, real.digests]), return_inverse=True)
    mine, theirs = torch.from_numpy(numbers).split([len(fake), len(real)])

    near = torch.zeros(len(fake), dtype=torch.bool)
    for part in distance_blocks(rows, columns, BLOCK):
        others_only = mine[part.rows, None] != theirs[part.columns]
        near[part.rows] |= ((part.squared <= limit) & others_only).any(1)
    return int(counts[near.numpy()].sum())


def _distinct(prints: Prints) -> tuple[Prints, ndarray]:
    """Return one of each group of equal images, and the sizes of the groups."""
    _, first, counts = np.unique(prints.digests, return_index=True, return_counts=True)
    return prints.take(first), counts
