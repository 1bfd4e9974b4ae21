"""Features that no order of the images changes, in the order of the images' content.

The last digits of a feature depend on the batch that it is computed in, and only the last batch can
be smaller. The images of that batch are therefore chosen by content, and kept back until the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy import ndarray

from experiments.engine.scoring.files.repeats import take_prints
from experiments.engine.scoring.inception import BATCH
from experiments.engine.scoring.measure import Extractor, Measured, measure
from experiments.engine.scoring.metrics import IS_BLOCK, inception_score

ORDER = "by content"  # as manifests name the order of scores


class Batched(Protocol):
    """Images that can be read in batches, again and again."""

    def batches(self, size: int = BATCH) -> Iterator[ndarray]:
        """Yield all images, uint8 (n, H, W, 3), in batches of this size."""
        ...


def measure_in_any_order(extractor: Extractor, images: Batched) -> tuple[Measured, ndarray]:
    """Return the features of all images in the order of their content, with their prints.

    Args:
        extractor: what measures.
        images: what is measured; it is read twice.

    Returns:
        The features, and the place of each row's image among the images as they were read (N,).

    Raises:
        ValueError: as `measure`.
    """
    prints = take_prints(images.batches(BATCH))
    order = prints.order()
    whole = len(order) - len(order) % BATCH
    last = order[whole:]

    # Rows of the measurement: first the whole batches as they are read, then the last one.
    measured = measure(extractor, _batches(images, set(last.tolist()), last))
    first = np.sort(order[:whole])
    rows = np.concatenate([np.searchsorted(first, order[:whole]), np.arange(whole, len(order))])
    measured.prints = prints.take(np.concatenate([first, last]))
    return measured.take(rows), order


def _batches(images: Batched, kept_back: set[int], last: ndarray) -> Iterator[ndarray]:
    """Yield whole batches of all images but those kept back, then those, in the order of `last`."""
    # Images wait until they fill a batch.
    waiting: list[ndarray] = []
    kept: dict[int, ndarray] = {}
    place = 0
    for batch in images.batches(BATCH):
        for image in batch:
            if place in kept_back:
                kept[place] = image
            else:
                waiting.append(image)
            place += 1
            if len(waiting) == BATCH:
                yield np.stack(waiting)
                waiting = []

    # Those kept back make the last, smaller batch.
    if kept:
        yield np.stack([kept[place] for place in last.tolist()])


def warn_of_order(in_file_order: Measured, score: float) -> list[str]:
    """Warn if ADM's inception score, over blocks in the order of a file, is far below this one."""
    if len(in_file_order.probabilities) <= IS_BLOCK:
        return []
    by_adm, _ = inception_score(in_file_order.probabilities)
    if by_adm >= 0.95 * score:
        return []
    return [
        f"the images are ordered: ADM's evaluator, which takes them in blocks of {IS_BLOCK}, would "
        f"print an IS of {by_adm:.2f}"
    ]
