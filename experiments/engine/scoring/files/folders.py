"""Folders of pictures that are scored like .npz files: lossless, 8 bits a channel, of one size.

What a file is, its content says and not its ending. A folder has no order of its own, and its
digest depends neither on names nor on their order.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray
from PIL import Image

from experiments.engine.data.image_files import MADE, ImageFile, has_images, parse_origin
from experiments.engine.data.pictures import (
    COMPANION_FILES,
    COMPANION_FOLDERS,
    DAMAGED,
    SUFFIXES,
    Crop,
    read_picture,
    show_name,
)
from experiments.engine.machine.system_errors import OF_THE_MACHINE, explain
from experiments.engine.sampling.samples import read_png_name

# Modes whose conversion to RGB keeps every level.
MODES = ("1", "L", "P", "RGB")
MODES_WITH_ALPHA = ("LA", "PA", "RGBA")
# PIL's names of formats that change levels when they store them.
LOSSY_FORMATS = frozenset({"JPEG", "MPO", "JPEG2000", "AVIF"})
LOSSY_TIFF = frozenset({"jpeg", "tiff_jpeg", "webp"})  # compressions inside a TIFF
PNG_DEPTH = 24  # where a PNG's header holds the bits of a channel
OPTION = "--lossy"


class ImageFolder:
    """The images of a folder and its subfolders, in the order of their names.

    shape: (N, H, W, 3).
    lossy: number of files of each lossy format.
    sizes: number of files of each stored size (height, width).
    labels: (N,) of a set that sample.py wrote, else None.
    index: each image's place in the order of generation (N,), likewise.
    origin: what the sampler wrote about itself, likewise.
    crop: side to which the images are cropped; None keeps their one size.
    rule: how they are cropped.
    """

    stray: tuple[str, ...] = ()  # statistics lie in .npz files alone

    def __init__(
        self,
        path: Path,
        *,
        lossy: bool = False,
        crop: int | None = None,
        rule: Crop = Crop.ADM,
    ) -> None:
        """List a folder and read the header of every picture.

        Args:
            path: the folder.
            lossy: whether lossy pictures are taken.
            crop: side of the crops; without it, all pictures need one size.
            rule: how they are cropped.

        Raises:
            ValueError: the folder is empty or holds something else than pictures, a lossy one
                that is not allowed, or pictures of several sizes.
        """
        self.path = path
        self.crop = crop
        self.rule = rule
        self.files = _list_pictures(path)

        # Every header is read before anything is measured.
        sizes: dict[tuple[int, int], list[Path]] = {}
        formats: Counter[str] = Counter()
        for file in self.files:
            size, lossy_format = _check_picture(file)
            sizes.setdefault(size, []).append(file)
            if lossy_format and not lossy:
                raise ValueError(
                    f"{show_name(file)}: is a lossy picture ({lossy_format}), whose levels are not "
                    f"those that were sampled; save PNG, or score it as it is with {OPTION}"
                )
            if lossy_format:
                formats[lossy_format] += 1
        self.lossy: Mapping[str, int] = dict(sorted(formats.items()))
        self.sizes = {size: len(files) for size, files in sizes.items()}
        if crop is None and len(sizes) > 1:
            raise ValueError(_name_two_sizes(path, sizes))
        height, width = next(iter(sizes)) if crop is None else (crop, crop)
        self.shape = (len(self.files), height, width, 3)
        self.labels, self.index, self.origin = _read_set(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int = 64) -> Iterator[ndarray]:
        """Read all images, uint8 (n, H, W, 3), `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def read(self, start: int, stop: int) -> ndarray:
        """Read the images from `start` to before `stop`, uint8 (n, H, W, 3)."""
        return np.stack([self._read(file) for file in self.files[start:stop]])

    def _read(self, file: Path) -> ndarray:
        if self.crop is not None:
            return read_picture(file, self.crop, self.rule)[0]
        pixels = _decode(file)
        if pixels.shape != self.shape[1:]:
            raise ValueError(f"{show_name(file)}: changed its size while the folder was read")
        return pixels


StoredImages = ImageFile | ImageFolder


def open_images(
    path: Path, *, lossy: bool = False, crop: int | None = None, rule: Crop = Crop.ADM
) -> StoredImages:
    """Open a folder of pictures or an .npz of images; ValueError if it holds no such images."""
    if path.is_dir():
        return ImageFolder(path, lossy=lossy, crop=crop, rule=rule)
    images = ImageFile(path)
    if crop is not None:
        raise ValueError(f"{path}: --size crops folders of pictures, and this is a file")
    return images


def holds_images(path: Path) -> bool:
    """Tell whether a path is a folder, or a file with images; ValueError if it is not readable."""
    return path.is_dir() or has_images(path)


def describe_lossy(images: StoredImages) -> str:
    """Say how many images were stored in a lossy format, '' for none."""
    if not images.lossy:
        return ""
    kinds = ", ".join(f"{num} {name}" for name, num in images.lossy.items())
    total = sum(images.lossy.values())
    return (
        f"{total} of {len(images)} files in {images.path.name} are lossy ({kinds}): "
        "their levels are not those that were sampled"
    )


def _list_pictures(folder: Path) -> list[Path]:
    """Return all pictures under a folder by name; ValueError for any other file."""
    files = []
    try:
        for file in sorted(folder.rglob("*")):
            within = file.relative_to(folder).parts
            if any(part.lower() in COMPANION_FOLDERS for part in within[:-1]) or file.is_dir():
                continue
            if file.name.lower() in COMPANION_FILES:
                continue

            # A text among the pictures may be a list of what was left out.
            if not file.name.lower().endswith(SUFFIXES):
                raise ValueError(
                    f"{show_name(file)}: is no picture, and a folder that is scored holds nothing "
                    f"else; known endings: {', '.join(SUFFIXES)}"
                )
            files.append(file)
    except OSError as error:
        raise ValueError(explain(error, "list the folder", folder)) from None
    if not files:
        raise ValueError(f"{folder}: is empty: there are no images to measure")
    return files


def _read_set(
    files: list[Path],
) -> tuple[ndarray | None, ndarray | None, dict[str, Any] | None]:
    """Return labels, indices and origin of a whole set of sample.py; None for other folders."""
    places = [read_png_name(file.name) for file in files]
    named = [place for place in places if place is not None]
    with Image.open(files[0]) as image:
        text = getattr(image, "text", {})
    origin = parse_origin(files[0], text[MADE]) if MADE in text else None
    index = np.array([number for number, _ in named])
    if origin is None or not np.array_equal(np.sort(index), np.arange(len(files))):
        return None, None, None
    return np.array([label for _, label in named]), index, origin


def _check_picture(file: Path) -> tuple[tuple[int, int], str]:
    """Return height and width of a picture, and its format if it is lossy, else ''.

    Raises:
        ValueError: the file is no picture, or one whose levels RGB bytes cannot hold.
    """
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{show_name(file)}: holds several frames; store one a file")
            if image.mode not in (*MODES, *MODES_WITH_ALPHA, "CMYK", "YCbCr"):
                raise ValueError(
                    f"{show_name(file)}: has levels of mode {image.mode}; scores are of 8 bits "
                    "a channel"
                )
            size = (image.height, image.width)
            kind = str(image.format)
            compression = str(image.info.get("compression", ""))
    except DAMAGED as error:
        raise _explain_damage(file, error) from None

    # PIL would cut 16 bits to 8 without a word, and calls both kinds of WebP by one name.
    with open(file, "rb") as content:
        if kind == "PNG" and _png_depth(content) > 8:
            raise ValueError(
                f"{show_name(file)}: has 16 bits a channel; scores are of 8 bits a channel"
            )
        if kind == "WEBP" and _is_lossy_webp(content):
            return size, "lossy WebP"
    if kind == "TIFF" and compression in LOSSY_TIFF:
        return size, f"TIFF with {compression}"
    return size, kind if kind in LOSSY_FORMATS else ""


def _decode(file: Path) -> ndarray:
    """Return the pixels of a picture, uint8 (H, W, 3)."""
    try:
        with Image.open(file) as image:
            transparent = image.mode in MODES_WITH_ALPHA or "transparency" in image.info
            if transparent and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError(
                    f"{show_name(file)}: has transparent pixels, which have no colour to score"
                )
            return np.asarray(image.convert("RGB"))
    except DAMAGED as error:
        raise _explain_damage(file, error) from None


def _explain_damage(file: Path, error: Exception) -> ValueError:
    """Return what to say of a picture that cannot be read."""
    if isinstance(error, ValueError) and str(error).startswith(show_name(file)):
        return error
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return ValueError(explain(error, "read", file))
    return ValueError(f"{show_name(file)}: cannot be decoded: {' '.join(str(error).split())}")


def _png_depth(file: IO[bytes]) -> int:
    return file.read(PNG_DEPTH + 1)[PNG_DEPTH]


def _is_lossy_webp(file: IO[bytes]) -> bool:
    """Tell whether a WebP holds a lossy picture: a chunk 'VP8 ' and not 'VP8L'."""
    file.seek(12)
    while header := file.read(8):
        name = header[:4]
        if name in (b"VP8 ", b"VP8L") or len(header) < 8:
            return name != b"VP8L"
        (length,) = struct.unpack("<I", header[4:])
        file.seek(length + length % 2, 1)
    return True


def _name_two_sizes(path: Path, sizes: dict[tuple[int, int], list[Path]]) -> str:
    """Name the most frequent size and a picture of another one."""
    ordered = sorted(sizes, key=lambda size: -len(sizes[size]))
    names = [f"{show_name(sizes[size][0].name)} {size[0]} x {size[1]}" for size in ordered[:2]]
    return (
        f"{path}: holds images of {len(sizes)} sizes, such as {names[0]} and {names[1]}; "
        "scores are of one size, and resized images are others"
    )
