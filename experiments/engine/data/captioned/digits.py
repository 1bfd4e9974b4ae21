"""Two of scikit-learn's digits on a canvas, as captions say, drawn anew at every visit.

N images of a batch, (H, W) the canvas
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.engine.data.captioned.grammar import CELL, SIZE, Group, captions_of
from experiments.engine.numerics.randomness import seed_at
from experiments.engine.specs.spec import Data

EVERY = 5  # of the digits, one is kept from trainings
SINGLES = 4  # pairs that are trained on for every single digit
BACKGROUND = -1.0


def digit_images(trained: bool) -> tuple[np.ndarray, np.ndarray]:
    """Load the digits that are trained on, or the others.

    Returns:
        Images (M, 8, 8) in [-1, 1], float32, and their digits (M,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % EVERY > 0) == trained
    return digits.images[chosen].astype(np.float32) / 8 - 1, digits.target[chosen]


class CaptionedDigits:
    """Canvases with one or two digits, and the indices of their captions.

    A row stands for a caption. Which digits of a class a visit sees follows from its position.

    labels: the caption of each row, (M,).
    flip: always False: a mirrored canvas has another caption.
    identity: what identifies the set in records.
    """

    flip = False

    def __init__(self, data: Data, trained: bool) -> None:
        """Prepare the part that is trained on, or all captions with digits that are not.

        In the former, a fifth of the rows are single digits, and no row is a pair held out.

        Raises:
            ValueError: the declaration is of another canvas or another number of captions.
        """
        self.captions = captions_of(data.name)
        if (data.size, data.channels, data.num_classes) != (SIZE, 1, len(self.captions)):
            raise ValueError(
                f"{data.name} has {SIZE} x {SIZE} pixels, 1 channel and {len(self.captions)} "
                f"captions, not size {data.size}, {data.channels} and {data.num_classes}"
            )
        self.trained = trained
        self.identity = {"data_source": "scikit-learn's digits"}
        self.images, classes = digit_images(trained)
        self.of_class = [np.flatnonzero(classes == digit) for digit in range(10)]
        self.labels = self._rows()

    def _rows(self) -> np.ndarray:
        """Return the caption of each row: every caption once, or what is trained on."""
        if not self.trained:
            return np.arange(len(self.captions))
        groups = np.array([caption.group.value for caption in self.captions])
        singles = np.flatnonzero(groups == Group.SINGLE.value)
        seen = np.flatnonzero(groups == Group.SEEN.value)
        copies = len(seen) // (SINGLES * len(singles))
        return np.concatenate([np.repeat(singles, copies), seen])

    def __len__(self) -> int:
        return len(self.labels)

    def take(
        self, indices: Tensor, seed: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw canvases (N, 1, H, W) float32 and captions (N,) at these rows.

        Digits come from (seed, position); a row's own number is its position by default.
        """
        positions = indices if positions is None else positions
        labels = self.labels[indices.numpy()]
        canvases = np.full((len(labels), 1, SIZE, SIZE), BACKGROUND, np.float32)
        for canvas, label, position in zip(canvases, labels, positions.tolist(), strict=True):
            # Two digits read other bits of the draw.
            draw = seed_at("captioned digit", seed, position)
            caption = self.captions[label]
            for digit, (row, column) in zip(caption.digits, caption.corners, strict=True):
                known = self.of_class[digit]
                image = self.images[known[(draw & 0x7FFFFFFF) % len(known)]]
                canvas[0, row : row + CELL, column : column + CELL] = image
                draw >>= 31
        return torch.from_numpy(canvases), torch.from_numpy(labels)
