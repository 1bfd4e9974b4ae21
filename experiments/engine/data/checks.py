"""What data must be before their name is used: CIFAR-10's content, arrays' levels, classes' order.

A float array is read whole once. What was measured is kept beside it, by its size and time.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.engine.data.pictures import (
    Pictures,
    describe_labels,
    describe_left_out,
    show_name,
)
from experiments.engine.machine.system_errors import explain, is_of_files, naming
from experiments.engine.records.files import written_whole
from experiments.engine.records.measured import measure_once
from experiments.engine.specs.spec import Data

CLASSES = "classes.txt"
CHUNK = 1 << 24  # numbers that are in memory at a time
TOLERANCE = 1e-6  # float32's rounding of a level
MAX_LATENT = 1000.0  # published VAEs' latents stay below 100
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012's training images
MIN_REACH = 0.75  # a set of pixels in [-1, 1] reaches at least this far on both sides of 0


@dataclass(frozen=True)
class KnownSplit:
    """What is known of a split of CIFAR-10.

    num: number of images, equally many of each class.
    digests: names of copies by the digest of their decoded images.
    class_means: mean level of each class and channel, in 0..1.
    """

    num: int
    digests: dict[str, str]
    class_means: tuple[tuple[float, float, float], ...]


# Measured on a copy that was encoded as JPEG; its means lie within 0.0002 of the published ones.
JPEG_COPY = "a copy encoded as JPEG"
CIFAR10_SPLITS = {
    "train": KnownSplit(
        50_000,
        {"225664eebbed3b30a1002f4d95d2be58bd7bfead93183478d16d52e5be6010f4": JPEG_COPY},
        (
            (0.5256, 0.5602, 0.5887),
            (0.4710, 0.4544, 0.4471),
            (0.4892, 0.4914, 0.4241),
            (0.4952, 0.4564, 0.4155),
            (0.4715, 0.4652, 0.3783),
            (0.4997, 0.4646, 0.4166),
            (0.4699, 0.4384, 0.3456),
            (0.5018, 0.4798, 0.4169),
            (0.4902, 0.5253, 0.5546),
            (0.4984, 0.4851, 0.4778),
        ),
    ),
    "test": KnownSplit(
        10_000,
        {"c116015799bfd98b8d8685f0ae027a17a2bb93acbfcb6e7f4497b3ece0bef022": JPEG_COPY},
        (
            (0.5337, 0.5718, 0.6058),
            (0.4705, 0.4544, 0.4483),
            (0.4899, 0.4949, 0.4282),
            (0.4932, 0.4553, 0.4160),
            (0.4650, 0.4593, 0.3707),
            (0.5091, 0.4745, 0.4252),
            (0.4748, 0.4422, 0.3463),
            (0.5049, 0.4834, 0.4255),
            (0.4946, 0.5246, 0.5528),
            (0.5049, 0.4901, 0.4850),
        ),
    ),
}
MEANS_AGREE = (
    0.002  # by which JPEG changes the mean of a class at most; other labels change it more
)


def check_cifar10(
    images: np.ndarray, labels: np.ndarray, split: str, source: str, paths: Sequence[Path] = ()
) -> str:
    """Compare a split with CIFAR-10 by number, classes and content; return which copy it is.

    Args:
        images: uint8 (M, 3, 32, 32), in any order.
        labels: integers (M,).
        split: 'train' or 'test'.
        source: 'torchvision' (its checksums were compared) or 'parquet'.
        paths: the files, beside which the digest of their content is kept.

    Raises:
        ValueError: the images are not that split of CIFAR-10.
    """
    known = CIFAR10_SPLITS[split]
    advice = "prepare CIFAR-10 again (python experiments/prepare.py cifar10 in an empty folder)"
    if len(images) != known.num:
        raise ValueError(
            f"{len(images)} images are not CIFAR-10's {split} split, which has {known.num}; a part "
            f"is missing or doubled: {advice}"
        )
    per_class = np.bincount(labels, minlength=10)
    if per_class.tolist() != [known.num // 10] * 10:
        raise ValueError(
            f"CIFAR-10's {split} split has {known.num // 10} images of each class, here are "
            f"{', '.join(map(str, per_class))}; {advice}"
        )
    if source == "torchvision":
        return "published"

    # Parquet files come in any order and encoding, so the digest knows no order ...
    digest = _digest_once(images, labels, paths)
    if digest in known.digests:
        return known.digests[digest]

    # ... and a copy of another encoding is known by the mean of each class.
    for label, means in enumerate(known.class_means):
        found = images[labels == label].mean((0, 2, 3)) / 255
        if np.abs(found - means).max() > MEANS_AGREE:
            raise ValueError(
                f"the images are not CIFAR-10's {split} split: class {label} has mean levels "
                f"{_levels(found)}, expected {_levels(means)}; {advice}"
            )
    return f"unknown copy, content {digest[:16]}"


def _digest_once(images: np.ndarray, labels: np.ndarray, paths: Sequence[Path]) -> str:
    """Digest decoded images, or take what was kept beside their files by this version of PIL."""
    if not paths:
        return content_digest(images, labels)
    digest = measure_once(
        paths, "content", lambda: content_digest(images, labels), version=Image.__version__
    )
    return str(digest)


def content_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """Digest decoded images and their labels, as SHA-256, whatever their order.

    Raises:
        ValueError: an image occurs twice.
    """
    rows: dict[bytes, tuple[int, int]] = {}
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        pixels = hashlib.sha256(image.tobytes()).digest()
        if pixels in rows:
            raise ValueError(f"rows {rows[pixels][0]} and {row} hold the same image; each is once")
        rows[pixels] = (row, label)
    pairs = sorted(pixels + bytes([label]) for pixels, (_, label) in rows.items())
    return hashlib.sha256(b"".join(pairs)).hexdigest()


def _levels(means: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in means)


def open_array(path: Path, advice: str = "write the array again") -> np.ndarray:
    """Open a memory-mapped array.

    Args:
        path: the file.
        advice: what to do with a damaged file.

    Raises:
        ValueError: the file is damaged, holds pickles, or cannot be opened.
    """
    try:
        with naming("read", path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error)) from None
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({reason}); {advice}") from None


def check_levels(path: Path, images: np.ndarray) -> None:
    """Raise ValueError unless an array holds grey levels as uint8 or pixels in [-1, 1] as float32.

    Args:
        path: file of the array.
        images: the array, memory-mapped.
    """
    expected = "uint8 in 0..255, or float32 in [-1, 1]"
    if images.dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
        raise ValueError(f"{path} holds {images.dtype}, expected {expected}; convert it")
    if images.dtype == np.uint8:
        if not _has_grey_levels(images):
            raise ValueError(f"{path} holds uint8 in 0..1, expected {expected}; convert it")
        return

    low, high = _range_of(path, images)
    inside = -1 - TOLERANCE <= low <= -MIN_REACH and MIN_REACH <= high <= 1 + TOLERANCE
    if not inside:  # also if a value is not finite
        raise ValueError(
            f"{path} holds float32 in {low:.4g}..{high:.4g}, expected {expected} with values near "
            "both ends; convert it"
        )


def _has_grey_levels(images: np.ndarray) -> bool:
    """Tell whether a level exceeds 1; real pictures end the search at the first chunk."""
    return any(chunk.max() > 1 for chunk in _chunks(images))


def _range_of(path: Path, images: np.ndarray) -> tuple[float, float]:
    """Least and greatest value of a file's array, measured once; NaN if it holds NaN."""
    low, high = measure_once([path], "range", lambda: _extremes(images))
    return float(low), float(high)


def _extremes(array: np.ndarray) -> list[float]:
    """Least and greatest value of an array; both are NaN if it holds NaN, as numpy's are."""
    extremes = np.array([(chunk.min(), chunk.max()) for chunk in _chunks(array)])
    return [float(extremes[:, 0].min()), float(extremes[:, 1].max())]


def _chunks(images: np.ndarray) -> list[np.ndarray]:
    """Cut an array into views of at most about CHUNK numbers, along its first axis."""
    rows = max(1, CHUNK // max(1, images[0].size))
    return [images[start : start + rows] for start in range(0, len(images), rows)]


def check_latents(path: Path, latents: np.ndarray, kind: str) -> None:
    """Raise ValueError, with the shard's name, unless its numbers can be latents.

    Args:
        path: file of the shard.
        latents: float32 (n, 2, K, h, w), where moments hold means, then deviations.
        kind: 'moments' or 'fixed'.
    """
    if not latents.size:
        return
    half = latents.shape[2] // 2
    parts = {"samples": latents}
    if kind == "moments":
        parts = {"means": latents[:, :, :half], "deviations": latents[:, :, half:]}
    ranges = measure_once(
        [path], "latents", lambda: {name: _extremes(part) for name, part in parts.items()}
    )

    # Comparisons with NaN fail. Means that are all equal were never filled in.
    for name in parts:
        low, high = ranges[name]
        if name == "deviations":
            expected = f"above 0 and at most {MAX_LATENT:g}"
            fits = low > 0 and high <= MAX_LATENT
        else:
            expected = f"not all equal, within {-MAX_LATENT:g}..{MAX_LATENT:g}"
            fits = -MAX_LATENT <= low < high <= MAX_LATENT
        if not fits:
            raise ValueError(
                f"{path}: its {name} lie in {low:.4g}..{high:.4g}, and those of a VAE are "
                f"{expected}; remove it and its .json, then prepare the latents again"
            )


def check_number(data: Data, labels: np.ndarray) -> dict[str, str]:
    """Compare a set that bears ImageNet's name with ImageNet's training images, by number.

    Returns:
        What a record must say of a part of ImageNet; empty for all of it, and for other sets.

    Raises:
        ValueError: there are more images than ImageNet has.
    """
    if not data.name.startswith("imagenet"):
        return {}
    if len(labels) > IMAGENET_IMAGES:
        raise ValueError(
            f"{data.name} holds {len(labels)} images, and ImageNet has {IMAGENET_IMAGES} training "
            "images; some are there twice: prepare the set again"
        )
    classes = len(np.unique(labels))
    if (len(labels), classes) == (IMAGENET_IMAGES, data.num_classes):
        return {}
    part = (
        f"{len(labels)} of ImageNet's {IMAGENET_IMAGES} training images, "
        f"{classes} of {data.num_classes} classes"
    )
    print(f"warning: {data.name} holds {part}; scores on them are not ImageNet's", file=sys.stderr)
    return {"data_part": part}


def describe_pictures(pictures: Pictures, own: bool) -> str:
    """Say how labels count the classes, what is left out, and whether the number is ImageNet's."""
    lines = [describe_labels(pictures.classes)]
    if pictures.left_out:
        lines.append(f"left out: {describe_left_out(pictures.left_out)}")
    if len(pictures.files) != IMAGENET_IMAGES and not own:
        lines.append(
            f"warning: {len(pictures.files)} images are not ImageNet's {IMAGENET_IMAGES} training "
            "images; scores on them are not ImageNet's"
        )
    return "\n".join(lines)


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Write the names of the classes, one a line, in the order of their labels; none, no file."""
    if not classes:
        return
    with written_whole(folder / CLASSES) as file:
        file.write(b"".join(os.fsencode(name) + b"\n" for name in classes))


def compare_classes(folder: Path, classes: Sequence[str]) -> None:
    """Raise ValueError if a folder's labels count other classes, or in another order.

    Folders that were prepared before classes.txt was written have none.
    """
    stored = read_classes(folder)
    if stored is None or stored == list(classes):
        return
    place = next(
        (k for k, pair in enumerate(zip(stored, classes, strict=False)) if pair[0] != pair[1]),
        min(len(stored), len(classes)),
    )
    names = [
        show_name(names[place]) if place < len(names) else "none" for names in (stored, classes)
    ]
    raise ValueError(
        f"{folder / CLASSES} orders the classes otherwise: label {place} is {names[0]} there and "
        f"{names[1]} here; name another --out or remove the folder"
    )


def read_classes(folder: Path) -> list[str] | None:
    """Read the classes of a prepared folder in the order of their labels; None if it has none."""
    path = folder / CLASSES
    if not path.exists():
        return None
    try:
        with naming("read", path):
            content = path.read_bytes()
    except OSError as error:
        raise ValueError(explain(error)) from None
    return [os.fsdecode(line) for line in content.removesuffix(b"\n").split(b"\n")]


def identify_classes(folder: Path, num_classes: int) -> dict[str, str]:
    """Digest the order of a prepared folder's labels, for records; empty if it has no classes.txt.

    Raises:
        ValueError: the file does not name each class once.
    """
    classes = read_classes(folder)
    if classes is None:
        return {}
    if len(classes) != num_classes or len(set(classes)) != num_classes or "" in classes:
        raise ValueError(
            f"{folder / CLASSES} names {len(set(classes))} classes, the labels count "
            f"{num_classes}; prepare the set again"
        )
    digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
    return {"data_classes": digest.hexdigest()[:16]}
