"""Folders of class folders of pictures, read and cropped as ADM does. PIL decides every bit, so its version is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Pictures:
    """Files relative to `root`, sorted by class folder and name, and their labels: the place of the folder's name."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def find_pictures(root: Path, num_classes: int) -> Pictures:
    """List a folder of class folders. ValueError in one line for a wrong number of classes or one that is empty or unreadable."""
    if not root.is_dir():
        raise ValueError(
            f"{root} is no folder; give one that holds a folder of images for each class"
        )
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) != num_classes:
        hint = f"; {root / 'train'} may be meant" if (root / "train").is_dir() else ""
        raise ValueError(
            f"{root} holds {len(classes)} class folders, {num_classes} are needed{hint}"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        try:
            found = sorted(
                entry.name for entry in (root / name).iterdir() if entry.suffix.lower() in SUFFIXES
            )
        except OSError as error:
            raise ValueError(
                f"class folder {root / name} cannot be read: {error.strerror}"
            ) from None
        if not found:
            raise ValueError(
                f"class folder {root / name} holds no image; known endings: {', '.join(sorted(SUFFIXES))}"
            )
        files += (f"{name}/{file}" for file in found)
        labels += [label] * len(found)
    return Pictures(root, tuple(classes), tuple(files), tuple(labels))


def read_picture(path: Path, size: int) -> tuple[np.ndarray, str]:
    """An image file as RGB, cropped to uint8 (size, size, 3), and the mode it was converted from. ValueError in one line if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # PIL would clip them to white
                raise ValueError(
                    f"its levels are no bytes (mode {image.mode}); save it with 8 bits a channel"
                )
            rgb, mode = image.convert("RGB"), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded: {' '.join(str(error).split())}") from None
    return centre_crop(rgb, size), mode


def describe_modes(modes: Mapping[str, int]) -> str:
    """Numbers of images by PIL's name of their mode, the most first: '15 L, 2 CMYK'."""
    return ", ".join(
        f"{num} {mode}" for mode, num in sorted(modes.items(), key=lambda item: (-item[1], item[0]))
    )


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, uint8 (size, size, C): halve by boxes while the short side is at least twice `size`, bicubic to it, cut the middle.

    Source: Dhariwal and Nichol 2021, as DiT and DiCo train. The rounding of the long side is Python's, to even.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
