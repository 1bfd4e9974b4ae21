from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from experiments.engine.data.image_files import (
    POOL,
    SPATIAL,
    ImageFile,
    array_names,
    file_sha256,
    has_images,
    name_in_errors,
    open_archive,
    read_small_array,
)
from experiments.engine.scoring.inception import BATCH, Inception
from experiments.engine.scoring.measure import NEIGHBOURS, Measured, blocks_sum, measure
from experiments.engine.scoring.metrics import Moments


@dataclass
class Reference:
    """What samples are scored against: statistics by layer, 'pool' and 'spatial', and rows (M, 2048) of its own images of `size` (H, W)."""

    moments: dict[str, Moments]
    rows: ndarray | None
    identity: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None


def read_reference(inception: Inception, path: Path) -> Reference:
    """A file with statistics, images or both, as ADM's evaluator reads it; ValueError if it holds neither."""
    with name_in_errors(path):
        return reference_of(
            path, measure(inception, ImageFile(path).batches()) if has_images(path) else None
        )


def check_reference(path: Path) -> None:
    """Read all of a reference but its images; ValueError in one line for what `read_reference` would refuse only after them."""
    if has_images(path):
        ImageFile(path)
    if not statistics(path) and not has_images(path):
        raise ValueError(f"{path.name}: holds neither images (arr_0) nor statistics (mu, sigma)")


def reference_of(path: Path, measured: Measured | None) -> Reference:
    """The same where the features of its images, if it has any, are known."""
    moments = statistics(path)
    if measured is None and "pool" not in moments:
        raise ValueError(f"{path.name}: holds neither images (arr_0) nor statistics (mu, sigma)")
    num = 0 if measured is None else len(measured.pool)
    warnings, names = [], {"pool": "mu, sigma", "spatial": "mu_s, sigma_s"}
    if missing := [layer for layer in names if layer not in moments]:
        instead = (
            "there is no sFID"
            if measured is None
            else f"distances by them are to those of its {num} images"
        )
        warnings.append(
            f"{path.name} holds no statistics ({', '.join(names[layer] for layer in missing)}): {instead}"
        )
        moments = moments | {
            layer: blocks_sum(getattr(measured, layer)) for layer in missing if measured is not None
        }
    identity = {
        "name": path.name,
        "sha256": file_sha256(path),
        "statistics": not warnings,
        "num_images": num,
    }
    return Reference(
        moments,
        measured.pool if measured else None,
        identity,
        warnings,
        measured.size if measured else None,
    )


def identity(inception: Inception, reference: Reference) -> dict[str, Any]:
    """The part of a manifest that names extractor, reference and neighbours."""
    return {
        "extractor": {
            "sha256": inception.sha256,
            "dtype": "fp32",
            "batch": BATCH,
            "resize": "TensorFlow 1 bilinear, 299",
        },
        "reference": reference.identity,
        "neighbours": {
            "k": NEIGHBOURS,
            "arithmetic": "float64",
            "num_reference": 0 if reference.rows is None else len(reference.rows),
        },
    }


def statistics(path: Path) -> dict[str, Moments]:
    """The published statistics of a reference by layer, 'pool' and 'spatial'; empty where the file has none.

    Their count is not in the file.
    """
    found = {}
    with open_archive(path) as archive:
        names = array_names(archive)
        for layer, mean, cov, dim in (
            ("pool", "mu", "sigma", POOL),
            ("spatial", "mu_s", "sigma_s", SPATIAL),
        ):
            if (mean in names) != (cov in names):
                raise ValueError(f"{path.name}: holds only one of {mean} and {cov}")
            if mean in names:
                found[layer] = Moments.known(
                    read_small_array(path, archive, mean, "f", (dim,)).astype(float),
                    read_small_array(path, archive, cov, "f", (dim, dim)).astype(float),
                )
                matrix = found[layer].cov
                if not (np.isfinite(found[layer].mean).all() and np.isfinite(matrix).all()):
                    raise ValueError(
                        f"{path.name}: {mean} or {cov} holds values that are not finite"
                    )
                if (
                    matrix.diagonal().min() < 0
                    or np.abs(matrix - matrix.T).max() > 1e-5 * np.abs(matrix).max()
                ):
                    raise ValueError(
                        f"{path.name}: {cov} is no covariance, which is symmetric without a negative variance"
                    )
    return found
