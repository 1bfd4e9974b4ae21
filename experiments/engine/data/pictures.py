"""Folders of class folders of pictures, read and cropped as ADM does, or as U-ViT does for COCO.

PIL decides every bit, so its version is recorded.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.engine.machine.system_errors import OF_THE_MACHINE, explain

# The endings that torchvision's ImageFolder takes, in any case.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
COMPANION_FILES = frozenset({".ds_store", "desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"})
COMPANION_FOLDERS = frozenset(
    {"$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information"}
)


# What PIL's readers raise about a damaged file.
DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Crop(Enum):
    """How a picture of any size becomes a square, as manifests name it."""

    ADM = "ADM centre crop: box halving, bicubic, middle"
    SQUARE = "central square of the short side, then Lanczos"


class UnreadablePicture(ValueError):
    """A picture that cannot be decoded.

    reason: why, in the words under which such pictures are counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Pictures:
    """The files of a folder of class folders.

    root: the folder.
    classes: names of the class folders, in the order of their labels.
    files: paths relative to `root`, sorted by class folder, subfolder and name.
    labels: for each file the position of its class folder in `classes`.
    left_out: how many files and folders are not taken, by reason.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    left_out: Mapping[str, int]


def find_pictures(root: Path, num_classes: int) -> Pictures:
    """List a folder of class folders, with their subfolders, as torchvision's ImageFolder does.

    Class folders whose names differ in a number count in the order of their numbers. Without
    classes the pictures are those of the folder and of its subfolders, all with label 0.

    Raises:
        ValueError: the number of class folders differs, one is empty or unreadable, or their
            order is ambiguous.
    """
    left_out: Counter[str] = Counter()
    if not num_classes:
        flat = tuple(_pictures_in(root, left_out))
        return Pictures(root, (), flat, (0,) * len(flat), left_out)
    classes = _class_folders(root, num_classes, left_out)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        pictures = _pictures_in(root / name, left_out)
        files += (f"{name}/{file}" for file in pictures)
        labels += [label] * len(pictures)
    return Pictures(root, tuple(classes), tuple(files), tuple(labels), left_out)


def show_name(name: str | Path) -> str:
    """Write a file's name for people: bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """List what is not taken, the most frequent reason first: 'files ending in .gif: 2'."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {num}" for reason, num in ordered)


def describe_labels(classes: Sequence[str]) -> str:
    """Say which class is the first label and which the last."""
    if not classes:
        return "no classes"
    last = len(classes) - 1
    return f"label 0 is {show_name(classes[0])}, label {last} is {show_name(classes[last])}"


def _class_folders(root: Path, num_classes: int, left_out: Counter[str]) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give a folder that holds one folder for each class")
    classes: list[str] = []
    for entry in _entries(root, "folder"):
        if not entry.is_dir():
            left_out["files beside the class folders"] += 1
        elif entry.name.startswith(".") or entry.name.lower() in COMPANION_FOLDERS:
            left_out["hidden or companion folders"] += 1
        else:
            classes.append(entry.name)

    # The number of classes, and an order of theirs that nobody can mistake.
    if len(classes) != num_classes:
        hint = f"; did you mean {root / 'train'}?" if (root / "train").is_dir() else ""
        raise ValueError(
            f"{root} holds {len(classes)} class folders, {num_classes} are needed{hint}"
        )
    return _order_classes(root, classes)


def _order_classes(root: Path, classes: list[str]) -> list[str]:
    """Sort names that differ in a number by that number, other names as text."""
    broken = [name for name in classes if "\n" in name]
    if broken:
        raise ValueError(
            f"class folder {broken[0]!r} in {root} has a line break in its name; rename it"
        )
    matches = [re.fullmatch(r"([^0-9]*)([0-9]+)([^0-9]*)", name) for name in classes]
    numbered = [match for match in matches if match]

    # Numbers among words count as text in some programs and as numbers in others.
    pure = [name for name in classes if re.fullmatch("[0-9]+", name)]
    if pure and len(pure) < len(classes):
        raise ValueError(
            f"{root} holds class folders named by numbers ({pure[0]}) and by words; the order of "
            "labels is ambiguous: rename them"
        )
    if len({(match[1], match[3]) for match in numbered}) != 1 or len(numbered) < len(classes):
        return sorted(classes)

    # All differ in their number alone.
    numbers: dict[int, str] = {}
    for match in numbered:
        other = numbers.setdefault(int(match[2]), match[0])
        if other != match[0]:
            raise ValueError(
                f"class folders {show_name(other)} and {show_name(match[0])} in {root} are the "
                "same number; rename one"
            )
    return [numbers[number] for number in sorted(numbers)]


def _pictures_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Paths of the pictures in a class folder: its own, then those of its subfolders, sorted."""
    here: Counter[str] = Counter()
    names = _walk(folder, "", here, (folder.resolve(),))
    if not names:
        reasons = f"; left out: {describe_left_out(here)}" if here else ""
        raise ValueError(
            f"class folder {show_name(folder)} holds no image; known endings: "
            f"{', '.join(SUFFIXES)}{reasons}"
        )
    left_out.update(here)
    return [name for _, name in sorted(names)]


def _walk(
    folder: Path, prefix: str, left_out: Counter[str], above: tuple[Path, ...]
) -> list[tuple[str, str]]:
    """List the pictures under a folder, each with its subfolder; links to folders count.

    `above` are the folders on the way here, so that a link in a circle ends.
    """
    names: list[tuple[str, str]] = []
    for entry in _entries(folder, "class folder"):
        if not entry.is_dir():
            reason = _why_not(entry)
            if reason:
                left_out[reason] += 1
            else:
                names.append((prefix.removesuffix("/"), f"{prefix}{entry.name}"))
        elif entry.name.lower() in COMPANION_FOLDERS:
            left_out["hidden or companion folders"] += 1
        elif entry.resolve() in above:
            left_out["links to a folder above them"] += 1
        else:
            way = (*above, entry.resolve())
            names += _walk(entry, f"{prefix}{entry.name}/", left_out, way)
    return names


def _entries(folder: Path, kind: str) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(explain(error, f"list the {kind}", folder)) from None


def _why_not(path: Path) -> str | None:
    """Why a file is not taken; None for a picture."""
    name = path.name.lower()
    if name in COMPANION_FILES:
        return "companion files of an operating system"
    if not name.endswith(SUFFIXES):
        ending = show_name(path.suffix.lower())
        return f"files ending in {ending}" if ending else "files without an ending"
    if path.exists() and not path.is_file():
        return "pipes, sockets or devices"
    if name.startswith("._") and not _is_picture(path):
        return "companion files of an operating system"
    return None


def _is_picture(path: Path) -> bool:
    """Tell whether PIL knows the kind of a file."""
    try:
        with Image.open(path):
            return True
    except DAMAGED as error:
        _refuse_machine(path, error)
        return False


def read_picture(path: Path, size: int, crop: Crop = Crop.ADM) -> tuple[np.ndarray, str]:
    """Read an image file as RGB and crop it to a side in pixels.

    Returns:
        Pixels, uint8 (size, size, 3), and PIL's name of the mode that was converted to RGB.

    Raises:
        UnreadablePicture: the file cannot be decoded.
        ValueError: the machine failed, and the file may be whole.
    """
    try:
        with Image.open(path) as image:
            # PIL would clip levels of more than 8 bits to white.
            if image.mode.startswith(("I", "F")):
                raise UnreadablePicture(
                    f"{show_name(path)} cannot be decoded: its levels are no bytes "
                    f"(mode {image.mode}); save it with 8 bits per channel",
                    "levels that are no bytes",
                )
            mode = image.mode
            rgb = image.convert("RGB")
    except UnreadablePicture:
        raise
    except DAMAGED as error:
        _refuse_machine(path, error)
        text = " ".join(str(error).split())
        message = f"{show_name(path)} cannot be decoded: {text}"
        raise UnreadablePicture(message, _reason(path, error)) from None
    return (centre_crop if crop is Crop.ADM else square_crop)(rgb, size), mode


def _refuse_machine(path: Path, error: Exception) -> None:
    """Raise ValueError if the machine failed, such as for too many open files."""
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        raise ValueError(explain(error, "read", path)) from None


def _reason(path: Path, error: Exception) -> str:
    """Say in few words why a picture cannot be decoded, in the same words for all such pictures."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, UnidentifiedImageError):
        return "of no known kind" if path.stat().st_size else "empty"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return "damaged or cut short"


def count_unreadable(first: UnreadablePicture, pictures: Pictures, size: int, workers: int) -> str:
    """Decode all pictures and return in one line how many cannot be, by reason.

    Args:
        first: the picture that ended a command, which is named.
        pictures: all of them.
        size: side of the crops in pixels.
        workers: threads that decode.
    """

    def judge(name: str) -> str:
        try:
            read_picture(pictures.root / name, size)
        except UnreadablePicture as error:
            return error.reason
        return ""

    print(f"{first}; counting all such pictures", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(workers) as threads:
        reasons = Counter(filter(None, threads.map(judge, pictures.files)))
    return (
        f"{first}; {reasons.total()} of {len(pictures.files)} pictures cannot be decoded "
        f"({describe_left_out(reasons)})"
    )


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


def square_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop as U-ViT does for MS-COCO, to uint8 (size, size, C).

    The central square of the short side is cut out, and a Lanczos filter brings it to `size`.
    Source: Bao et al. 2023, and the code of U-ViT at ce55170.
    """
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
