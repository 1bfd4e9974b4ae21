"""The judge of captioned digits: it reads one cell of a canvas, as a digit or as blank.

It is trained on the digits that networks train on, with noise, and tested on the others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.data.captioned.digits import BACKGROUND, digit_images
from experiments.engine.data.captioned.grammar import CELL
from experiments.engine.data.sets import ImageSet
from experiments.engine.judges.classifiers import (
    Exam,
    Identity,
    PortableLesson,
    cached_classifier,
)
from experiments.engine.specs.spec import Data

BLANK = 10  # the class after the ten digits
CLASSES = 11


class CellClassifier(nn.Module):
    """Three convolutions: (N, 1, 8, 8) -> features (N, 64) and logits (N, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv1(x))  # (N, 32, 8, 8)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 64, 4, 4)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # (N, 64, 2, 2)
        features = F.relu(self.hidden(x.flatten(1)))  # (N, 64)
        return features, self.head(features)


LESSON = PortableLesson("cells", CellClassifier, steps=600, batch=128, lr=3e-3, shift=0, noise=0.1)


def cell_judge(cache: Path) -> tuple[nn.Module, Identity]:
    """Return the judge, and what identifies it: its accuracy is that on digits held out."""
    images, digits = digit_images(trained=True)

    # Blank cells are as many as digits of a class.
    num = len(digits) // 10
    blanks = np.full((num, CELL, CELL), BACKGROUND, np.float32)
    train = _cells(np.concatenate([images, blanks]), np.concatenate([digits, [BLANK] * num]))
    test = _cells(*digit_images(trained=False))
    content = train.images.tobytes() + train.labels.tobytes()
    return cached_classifier(
        LESSON,
        hashlib.sha256(content).hexdigest(),
        lambda: (train, torch.arange(len(train))),
        Exam(test, torch.arange(len(test))),
        cache,
    )


def _cells(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(images[:, None], labels, Data("cells", CELL, 1, CLASSES))
