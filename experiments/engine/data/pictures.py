"""Folders of class folders of pictures, read and cropped as ADM does.

PIL decides every bit, so its version is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Pictures:
    """The files of a folder of class folders.

    root: the folder.
    classes: names of the class folders, sorted.
    files: paths relative to `root`, sorted by class folder and name.
    labels: for each file the position of its class folder in `classes`.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def find_pictures(root: Path, num_classes: int) -> Pictures:
    """List a folder of class folders.

    Raises:
        ValueError: the number of class folders differs, or one is empty or unreadable.
    """
    classes = _class_folders(root, num_classes)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        pictures = _pictures_in(root / name)
        files += (f"{name}/{file}" for file in pictures)
        labels += [label] * len(pictures)
    return Pictures(root, tuple(classes), tuple(files), tuple(labels))


def _class_folders(root: Path, num_classes: int) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give a folder that holds one folder for each class")
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) != num_classes:
        hint = f"; did you mean {root / 'train'}?" if (root / "train").is_dir() else ""
        raise ValueError(
            f"{root} holds {len(classes)} class folders, {num_classes} are needed{hint}"
        )
    return classes


def _pictures_in(folder: Path) -> list[str]:
    """Names of the pictures in a class folder, sorted."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ValueError(f"class folder {folder} cannot be read: {error.strerror}") from None
    if not names:
        raise ValueError(
            f"class folder {folder} holds no image; known endings: {', '.join(sorted(SUFFIXES))}"
        )
    return names


def read_picture(path: Path, size: int) -> tuple[np.ndarray, str]:
    """Read an image file as RGB and crop it.

    Returns:
        Pixels, uint8 (size, size, 3), and PIL's name of the mode that was converted to RGB.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            # PIL would clip levels of more than 8 bits to white.
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"its levels are no bytes (mode {image.mode}); save it with 8 bits per channel"
                )
            mode = image.mode
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded: {' '.join(str(error).split())}") from None
    return centre_crop(rgb, size), mode


def describe_modes(modes: Mapping[str, int]) -> str:
    """List numbers of images by PIL's name of their mode, the most frequent first: '15 L, 2 P'."""
    ordered = sorted(modes.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{num} {mode}" for mode, num in ordered)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop as ADM does, to uint8 (size, size, C).

    Box filters halve the image while its short side is at least twice `size`. A bicubic filter
    brings the short side to `size`, and the middle is cut out. The long side rounds as in Python,
    halves to even. Source: Dhariwal & Nichol 2021; DiT and DiCo train on these crops.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top = (height - size) // 2
    left = (width - size) // 2
    return pixels[top : top + size, left : left + size]
