"""What a way of scoring hands back, and what manifests say of labels and packages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy import ndarray


@dataclass(frozen=True)
class Scored:
    """The scores of one set of images, and what decided them."""

    # Scores by name, with their errors.
    values: dict[str, Any]
    # SHA-256 of the network's weights.
    weights_sha256: str
    # The key of the weights: 'ema', or the key under which a published file holds them.
    key: str
    # Images that were sampled at a time.
    batch: int
    # What a manifest says of the measurement.
    measure: dict[str, Any]


def label_histogram(labels: ndarray) -> str:
    """Return a short hash of the classes that occur and how often."""
    counts = np.stack(np.unique(labels, return_counts=True))
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16]


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of torch and of those of the packages that are installed."""
    versions = {"torch": str(torch.__version__)}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
