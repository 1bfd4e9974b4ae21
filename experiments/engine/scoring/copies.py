"""Whether samples copy training images, in the feature space of a classifier.

A sample counts as near if it is nearer to a training image than that image's nearest test image is.
Held-out images that no training saw are near at some rate too, and that rate is the measure: a
network that copies is near far more often.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import nn

from experiments.engine.data.sets import ImageSet, Part, load, unfolded
from experiments.engine.judges.classifiers import extract
from experiments.engine.records.files import locked, written_whole
from experiments.engine.scoring.metrics import proportion_se
from experiments.engine.specs.spec import Data

ROWS = 500  # rows whose distances to another set are in memory together


@dataclass(frozen=True)
class Parts:
    """Features of the parts of a set, (n, d) each."""

    train: ndarray
    validation: ndarray
    test: ndarray


def check_copies(samples: ndarray, parts: Parts) -> dict[str, Any]:
    """Return the share of samples that are near training images, beside that of held-out images.

    Args:
        samples: features (N, d).
        parts: features of the set. At most N validation images stand beside the samples.

    Returns:
        `near_training` and `near_training_heldout` with their binomial errors, and the number of
        held-out images.
    """
    heldout = parts.validation[: len(samples)]
    share = _share_near(samples, parts)
    share_heldout = _share_near(heldout, parts)
    return {
        "near_training": share,
        "near_training_se": proportion_se(share, len(samples)),
        "near_training_heldout": share_heldout,
        "near_training_heldout_se": proportion_se(share_heldout, len(heldout)),
        "near_training_heldout_num": len(heldout),
    }


def part_features(data: Data, network: nn.Module, identity: str, cache: Path) -> Parts:
    """Return the features of all parts of a set, from the cache if they were computed before.

    Args:
        data: a set that is split.
        network: the classifier.
        identity: SHA-256 of its weights.
        cache: folder of features; classifier and images name the files.
    """
    features = {}
    for part in Part:
        images = load(unfolded(data), part)
        assert isinstance(images, ImageSet)
        features[part.value] = _cached_features(images, network, identity, cache)
    return Parts(**features)


def _cached_features(images: ImageSet, network: nn.Module, identity: str, cache: Path) -> ndarray:
    content = hashlib.sha256(images.images.tobytes() + identity.encode()).hexdigest()[:16]
    path = cache / f"features-{content}.npy"
    with locked(cache / "features.lock"):
        if not path.exists():
            pixels, _ = images.take(torch.arange(len(images)))
            features, _ = extract(network, pixels)
            with written_whole(path) as file:
                np.save(file, features, allow_pickle=False)
    return np.load(path, allow_pickle=False)


def _share_near(rows: ndarray, parts: Parts) -> float:
    """Return the share of rows that are nearer to a training image than its nearest test image."""
    distances, nearest = _nearest(rows, parts.train)
    training, back = np.unique(nearest, return_inverse=True)
    to_test, _ = _nearest(parts.train[training], parts.test)
    return float((distances < to_test[back]).mean())


def _nearest(rows: ndarray, others: ndarray) -> tuple[ndarray, ndarray]:
    """Return the distance of every row to the nearest of the others, and the other's index."""
    other = torch.from_numpy(others)
    distances, indices = [], []
    for part in torch.from_numpy(rows).split(ROWS):
        nearest = torch.cdist(part, other).min(1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(distances).numpy(), torch.cat(indices).numpy()
