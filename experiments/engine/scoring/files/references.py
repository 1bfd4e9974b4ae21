"""Reference files: the statistics of a folder of pictures, as ADM's evaluator reads them.

A file holds mu, sigma, mu_s and sigma_s. What they are of lies beside them as JSON, in `made`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from experiments.engine.data.image_files import name_in_errors, read_origin
from experiments.engine.data.pictures import Crop
from experiments.engine.records.files import require_target, written_whole
from experiments.engine.scoring.files.any_order import measure_in_any_order
from experiments.engine.scoring.files.folders import ImageFolder, StoredImages
from experiments.engine.scoring.files.repeats import count_repeats
from experiments.engine.scoring.measure import Extractor
from experiments.engine.scoring.moments import moments_of
from experiments.engine.scoring.reference import content_sha256, identify_features, layers_of

KIND = "reference"
OPTION = "--out"
CROPS = {
    Crop.ADM: "ADM: box halvings, bicubic to the short side, centre",
    Crop.SQUARE: Crop.SQUARE.value,
}


def require_own_reference(path: Path) -> None:
    """Raise ValueError if a reference cannot be written, or would replace something else."""
    require_target(path, OPTION)
    if path.exists() and _kind_of(path) != KIND:
        raise ValueError(f"{path}: is no reference that this command wrote; name another {OPTION}")


def write_reference(extractor: Extractor, images: StoredImages, path: Path) -> dict[str, Any]:
    """Measure images and write their statistics, whole or not at all; return what they are of.

    Args:
        extractor: what measures.
        images: what is measured.
        path: the file.

    Raises:
        ValueError: below two images, which have no covariance.
    """
    if len(images) < 2:
        raise ValueError(f"{images.path}: holds one image, and statistics need at least two")
    with name_in_errors(images.path):
        measured, _ = measure_in_any_order(extractor, images)
    arrays: dict[str, ndarray] = {}
    for layer in layers_of(measured):
        moments = moments_of(getattr(measured, layer.name))
        arrays |= {layer.mean: moments.mean, layer.cov: moments.cov}

    # What the statistics are of.
    assert measured.prints is not None
    counted = count_repeats(measured.prints, None)
    made: dict[str, Any] = {
        "kind": KIND,
        "num": len(images),
        "size": list(images.shape[1:3]),
        "crop": None,
        "sha256": content_sha256(images.path, measured),
        "features": identify_features(extractor),
        **counted,
    }
    if isinstance(images, ImageFolder):
        made |= _describe_folder(images)

    with written_whole(path) as file:
        np.savez(file, allow_pickle=False, made=np.array(json.dumps(made)), **arrays)
    return made


def _describe_folder(images: ImageFolder) -> dict[str, Any]:
    """Say how pictures became images of one size."""
    heights, widths = zip(*images.sizes, strict=True)
    return {
        "crop": CROPS[images.rule] if images.crop else None,
        "stored_sizes": {
            "num": len(images.sizes),
            "smallest": [min(heights), min(widths)],
            "largest": [max(heights), max(widths)],
        },
        "lossy": dict(images.lossy),
    }


def _kind_of(path: Path) -> object:
    """Return the kind that a file says of itself, None for any other file."""
    try:
        return read_origin(path).get("kind")
    except ValueError:
        return None
