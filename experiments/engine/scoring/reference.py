"""What samples are scored against: published statistics, reference images or both."""

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
    read_origin,
    read_small_array,
)
from experiments.engine.data.pictures import Crop
from experiments.engine.scoring.files.any_order import measure_in_any_order
from experiments.engine.scoring.files.folders import (
    StoredImages,
    describe_lossy,
    holds_images,
    open_images,
)
from experiments.engine.scoring.files.repeats import Prints
from experiments.engine.scoring.inception import BATCH
from experiments.engine.scoring.measure import Extractor, Measured, WithDinov2
from experiments.engine.scoring.moments import Moments, moments_of
from experiments.engine.scoring.neighbours import DENSITY_BALL, NEIGHBOURS


@dataclass(frozen=True)
class Layer:
    """A layer whose statistics a reference file can hold."""

    # As `Measured` and `Reference.moments` name the layer.
    name: str
    # Names of mean and covariance in the file.
    mean: str
    cov: str
    dim: int


LAYERS = (
    Layer("pool", "mu", "sigma", POOL),
    Layer("spatial", "mu_s", "sigma_s", SPATIAL),
)
DINOV2 = Layer("dinov2", "mu_dinov2", "sigma_dinov2", 1024)
NEITHER = "holds neither images (arr_0) nor statistics (mu, sigma)"


@dataclass
class Reference:
    """What samples are scored against."""

    # Statistics by layer: 'pool', 'spatial' and, where they are known, 'dinov2'.
    moments: dict[str, Moments]
    # Pool features (M, 2048) of the reference's own images; None if it has no images.
    rows: ndarray | None
    # What a manifest says of the reference.
    identity: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    # Height and width of the images, where they are known.
    size: tuple[int, int] | None = None
    # What tells its images apart, where that was taken.
    prints: Prints | None = None
    # DINOv2's class tokens of its own images (M, 1024), where they were taken.
    dinov2: ndarray | None = None


def layers_of(measured: Measured) -> tuple[Layer, ...]:
    """Return the layers that were measured and that a reference file can hold."""
    return LAYERS if measured.dinov2 is None else (*LAYERS, DINOV2)


def read_reference(extractor: Extractor, path: Path, *, lossy: bool = False) -> Reference:
    """Read a file with statistics, images or both as ADM's evaluator does, or a folder of pictures.

    The order of the images changes nothing.

    Args:
        extractor: what measures images.
        path: the file or folder.
        lossy: whether lossy pictures are taken.

    Raises:
        ValueError: if the file holds neither, or statistics of other features.
    """
    with name_in_errors(path):
        if not path.is_dir():
            check_features(path, extractor)
        if not holds_images(path):
            reference = reference_of(path, None)
            reference.size = size_of(path)
            if DINOV2.name in extractor.layers and DINOV2.name not in reference.moments:
                raise ValueError(
                    f"{path}: holds neither images nor DINOv2's statistics ({DINOV2.mean}, "
                    f"{DINOV2.cov}); leave out --dinov2, or write the reference with it"
                )
            return reference
        images = open_images(path, lossy=lossy)
        measured, _ = measure_in_any_order(extractor, images)
        return reference_of(path, measured, images)


def check_reference(path: Path) -> None:
    """Read all of a reference but its images.

    Raises:
        ValueError: for what `read_reference` would refuse only after it has measured the images.
    """
    if has_images(path):
        ImageFile(path)
    if not statistics(path) and not has_images(path):
        raise ValueError(f"{path}: {NEITHER}")


def require_crop(path: Path, crop: Crop) -> None:
    """Raise ValueError if a file says that its pictures were cropped otherwise."""
    made = read_origin(path)
    if made and made.get("crop") != crop.value:
        raise ValueError(
            f"{path}: its images were cropped otherwise ({made.get('crop')}); write it again with "
            f"--crop {crop.name.lower()}"
        )


def reference_of(
    path: Path, measured: Measured | None, images: StoredImages | None = None
) -> Reference:
    """Return the reference in a file or folder whose images, if it has any, are measured already.

    Args:
        path: the file or folder.
        measured: features of its images.
        images: the images, where it is known how they are stored.
    """
    moments = {} if path.is_dir() else dict(statistics(path))
    if measured is None and "pool" not in moments:
        raise ValueError(f"{path}: {NEITHER}")
    num_images = 0 if measured is None else len(measured.pool)

    # Statistics that the file lacks are those of its own images.
    warnings = []
    layers = LAYERS if measured is None else layers_of(measured)
    missing = [layer for layer in layers if layer.name not in moments]
    if missing:
        names = ", ".join(f"{layer.mean}, {layer.cov}" for layer in missing)
        instead = "there is no sFID"
        if measured is not None:
            instead = f"distances by them are to those of its {num_images} images"
        warnings.append(f"{path.name} holds no statistics ({names}): {instead}")
    if measured is not None:
        for layer in missing:
            moments[layer.name] = moments_of(getattr(measured, layer.name))

    identity = {
        "name": path.name,
        "sha256": content_sha256(path, measured),
        "statistics": not missing,
        "num_images": num_images,
    }
    # Files that this suite writes say how many pictures they are of, and how those were cropped.
    made = {} if path.is_dir() else read_origin(path)
    if made.get("crop") == Crop.SQUARE.value:
        identity |= {"crop": made["crop"], "num_pictures": made["num"], "lossy": made["lossy"]}
    if images is not None and images.lossy:
        identity["lossy"] = dict(images.lossy)
        warnings.append(describe_lossy(images))
    if measured is None:
        return Reference(moments, None, identity, warnings)
    return Reference(
        moments,
        measured.pool,
        identity,
        warnings,
        measured.size,
        measured.prints,
        measured.dinov2,
    )


def content_sha256(path: Path, measured: Measured | None) -> str:
    """Return the digest of a file, or of a folder's images in any order and under any names."""
    if not path.is_dir():
        return file_sha256(path)
    assert measured is not None and measured.prints is not None and measured.size is not None
    return measured.prints.digest(measured.size)


def check_features(path: Path, extractor: Extractor) -> None:
    """Raise ValueError if a file says that its statistics are of other features."""
    features = read_origin(path).get("features")
    if not isinstance(features, dict):
        return
    used = identify_features(extractor)
    pairs = [("--inception", features, used)]
    if isinstance(features.get(DINOV2.name), dict) and DINOV2.name in used:
        pairs.append(("--dinov2", features[DINOV2.name], used[DINOV2.name]))
    for option, stored, named in pairs:
        if stored.get("sha256") != named["sha256"]:
            raise ValueError(
                f"{path}: its statistics are of features {str(stored.get('sha256'))[:16]}, and "
                f"{option} names {named['sha256'][:16]}; write it again with these weights"
            )


def size_of(path: Path) -> tuple[int, int] | None:
    """Return height and width of the images that a file's statistics are of, where it says so."""
    size = read_origin(path).get("size")
    return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None


def identify_features(extractor: Extractor) -> dict[str, Any]:
    """Return what names the features in manifests and reference files."""
    identity = {
        "name": extractor.name,
        "sha256": extractor.sha256,
        "dtype": "fp32",
        "batch": BATCH,
        "resize": "TensorFlow 1 bilinear, 299",
    }
    if isinstance(extractor, WithDinov2):
        identity[DINOV2.name] = extractor.dinov2.describe()
    return identity


def identify_measure(extractor: Extractor, reference: Reference) -> dict[str, Any]:
    """Return the part of a manifest that names extractor, reference and neighbours."""
    num_rows = 0 if reference.rows is None else len(reference.rows)
    return {
        "extractor": identify_features(extractor),
        "reference": reference.identity,
        "neighbours": {
            "k": NEIGHBOURS,
            "arithmetic": "float64",
            "num_reference": num_rows,
            "density_ball": DENSITY_BALL,
        },
    }


def statistics(path: Path) -> dict[str, Moments]:
    """Return the published statistics in a reference file by layer; empty if it has none.

    The number of images that they are of is not in the file.

    Raises:
        ValueError: for half a pair of statistics, or for values that are no mean and covariance.
    """
    moments = {}
    with open_archive(path) as archive:
        names = array_names(archive)

        # Each layer has a mean and a covariance, or neither.
        for layer in (*LAYERS, DINOV2):
            if (layer.mean in names) != (layer.cov in names):
                raise ValueError(f"{path}: holds only one of {layer.mean} and {layer.cov}")
            if layer.mean not in names:
                continue

            # The values are checked before anything is compared with them.
            mean = read_small_array(path, archive, layer.mean, "f", (layer.dim,))
            cov = read_small_array(path, archive, layer.cov, "f", (layer.dim, layer.dim))
            moments[layer.name] = Moments.known(mean.astype(float), cov.astype(float))
            _check_statistics(path, layer, moments[layer.name])

    return moments


def _check_statistics(path: Path, layer: Layer, moments: Moments) -> None:
    cov = moments.cov
    if not (np.isfinite(moments.mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: {layer.mean} or {layer.cov} holds values that are not finite")
    asymmetry = np.abs(cov - cov.T).max()
    if cov.diagonal().min() < 0 or asymmetry > 1e-5 * np.abs(cov).max():
        raise ValueError(
            f"{path}: {layer.cov} is no covariance, which is symmetric without a negative variance"
        )
