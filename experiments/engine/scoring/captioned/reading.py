"""What canvases show of their captions, as a judge reads their cells.

N canvases, K named cells of all of them together, d features of a cell
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from experiments.engine.data.captioned.grammar import CELL, Caption, Group
from experiments.engine.judges.cells import BLANK
from experiments.engine.judges.classifiers import extract
from experiments.engine.scoring.frechet import frechet, frechet_influence
from experiments.engine.scoring.moments import Moments

EMPTY = -0.9  # below this mean level, nothing lies outside of the named cells


@dataclass(frozen=True)
class Reading:
    """What the judge reads on canvases."""

    # Of the named cells, canvas by canvas, (K, d).
    features: ndarray
    # The canvas of each named cell, (K,).
    canvases: ndarray
    # What the caption of each canvas is to a training, (N,).
    groups: ndarray
    # Each (N,), by the name of the score: whether every named cell holds its digit ('all'), the
    # share of right cells ('digit'), whether no named cell is blank and nothing lies outside of
    # them ('layout'), and whether two different digits are exchanged ('swapped').
    scores: dict[str, ndarray]

    def mean(self, score: str, group: Group) -> tuple[float, float]:
        """Return a score's mean over the canvases of a group, and its standard error."""
        values = self.scores[score][self.groups == group.value]
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))

    def distance(self, real: Reading, group: Group | None = None) -> tuple[float, float]:
        """Return the Fréchet distance of cells to real ones, of all or of a group, with its error.

        The cells of a canvas are drawn together, so the error is over canvases. It is nan where
        there are fewer than four cells a feature.
        """
        features, canvases = self._cells_of(group)
        others, _ = real._cells_of(group)
        dim = features.shape[1]
        moments, real_moments = Moments(dim), Moments(dim)
        moments.update(features)
        real_moments.update(others)
        value = frechet(moments, real_moments)
        if len(features) < 4 * dim:
            return value, math.nan
        psi = frechet_influence(features, moments, real_moments)
        by_canvas = np.bincount(canvases, psi - psi.mean())
        return value, float(np.sqrt(np.square(by_canvas).sum()) / len(features))

    def _cells_of(self, group: Group | None) -> tuple[ndarray, ndarray]:
        if group is None:
            return self.features, self.canvases
        chosen = self.groups[self.canvases] == group.value
        return self.features[chosen], self.canvases[chosen]


def read(
    judge: nn.Module, canvases: Tensor, labels: Tensor, captions: tuple[Caption, ...]
) -> Reading:
    """Read canvases (N, 1, H, W), whose captions have the indices `labels` (N,)."""
    named = [captions[label] for label in labels.tolist()]
    owners = np.repeat(np.arange(len(named)), [len(caption.digits) for caption in named])

    # Cut out the named cells, and blank them on a copy, whose rest should be empty.
    rest = canvases.clone()
    outside = np.array([rest[0].numel() - CELL**2 * len(caption.digits) for caption in named])
    cells = []
    for canvas, caption in enumerate(named):
        for row, column in caption.corners:
            cell = (canvas, slice(None), slice(row, row + CELL), slice(column, column + CELL))
            cells.append(canvases[cell])
            rest[cell] = 0
    features, probabilities = extract(judge, torch.stack(cells))
    shown = probabilities.argmax(1)  # (K,)

    # Each cell is right by itself, or would be in the other cell of its canvas.
    wanted = np.concatenate([caption.digits for caption in named])
    exchanged = np.concatenate([caption.digits[::-1] for caption in named])
    number = np.bincount(owners)

    def share(of_cells: ndarray) -> ndarray:
        return np.bincount(owners, of_cells) / number  # (N,)

    digit = share(shown == wanted)
    distinct = share(wanted != exchanged) == 1
    levels = rest.sum((1, 2, 3)).double().numpy() / outside
    scores = {
        "all": digit == 1,
        "digit": digit,
        "layout": (levels < EMPTY) & (share(shown == BLANK) == 0),
        "swapped": (share(shown == exchanged) == 1) & distinct,
    }
    groups = np.array([caption.group.value for caption in named])
    return Reading(
        features, owners, groups, {name: values.astype(float) for name, values in scores.items()}
    )
