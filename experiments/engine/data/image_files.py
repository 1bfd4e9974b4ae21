"""ADM-style files: images `arr_0` uint8 (N, H, W, 3) with labels `arr_1`, or the statistics mu, sigma, mu_s, sigma_s.

Images are streamed, so that 50,000 of 512 x 512 need no memory. Nothing pickled is ever read.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy import ndarray
from numpy.lib import format as npy

from experiments.engine.records.files import written_whole

POOL, SPATIAL = 2048, 7 * 17 * 17
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ImageFile:
    """The images of a file, read in batches, and what lies beside them: `labels` (N,), `index` (N,) and `made`, or None.

    index: each image's place in the order of generation; made: what the sampler wrote about itself.
    Raises ValueError in one line for a file without arr_0, of another type or shape, or that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as archive:
            if "arr_0" not in (names := _names(archive)):
                raise ValueError(
                    f"{path.name}: holds no images (arr_0), only {', '.join(names) or 'nothing'}"
                )
            self.stray = sorted({"mu", "sigma", "mu_s", "sigma_s"} & set(names))
            with archive.open("arr_0.npy") as file:
                self.shape = _image_shape(path, file)
            self.labels = (
                _small(path, archive, "arr_1", "iu", self.shape[:1]) if "arr_1" in names else None
            )
            self.index = (
                _small(path, archive, "index", "iu", self.shape[:1]) if "index" in names else None
            )
            self.origin = (
                _origin(path, str(_small(path, archive, "made", "U", ())))
                if "made" in names
                else None
            )
        for name, numbers in (("arr_1", self.labels), ("index", self.index)):
            if numbers is not None and numbers.min() < 0:
                raise ValueError(
                    f"{path.name}: {name} holds {numbers.min()}; labels and indices count from 0"
                )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = 64) -> Iterator[ndarray]:
        """uint8 (n, H, W, 3), `size` at a time, in file order."""
        with _opened(self.path) as archive, archive.open("arr_0.npy") as file:
            _image_shape(self.path, file)
            for start in range(0, len(self), size):
                yield self._read(file, start, min(start + size, len(self)))

    def read(self, start: int, stop: int) -> ndarray:
        """uint8 (stop - start, H, W, 3) from any place."""
        with _opened(self.path) as archive, archive.open("arr_0.npy") as file:
            _image_shape(self.path, file)
            file.seek(start * math.prod(self.shape[1:]), 1)
            return self._read(file, start, stop)

    def _read(self, file: BinaryIO, start: int, stop: int) -> ndarray:
        size, data = (stop - start) * math.prod(self.shape[1:]), bytearray()
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
        if len(data) < size:
            raise ValueError(f"{self.path.name}: cut short after {start} of {len(self)} images")
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])


def has_images(path: Path) -> bool:
    with _opened(path) as archive:
        return "arr_0" in _names(archive)


def write_images(
    path: Path,
    images: Iterable[ndarray],
    shape: tuple[int, ...],
    labels: ndarray,
    index: ndarray,
    made: dict[str, Any],
) -> None:
    """Write images (uint8 (n, H, W, 3) parts that add up to `shape`) and what lies beside them; the file is whole or absent."""
    with (
        written_whole(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for part in images:
                member.write(np.ascontiguousarray(part).tobytes())
        for name, array in (
            ("arr_1", labels),
            ("index", index),
            ("made", np.array(json.dumps(made, sort_keys=True))),
        ):
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, np.asarray(array), allow_pickle=False)


def file_sha256(path: Path) -> str:
    """Of a whole file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """A ValueError within says which file it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            str(error) if str(error).startswith(path.name) else f"{path.name}: {error}"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of an .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path.name}: not a readable .npz ({str(error).strip() or 'cut short'}): damaged, a download page, a git-lfs pointer?"
        ) from None


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _origin(path: Path, text: str) -> dict[str, Any]:
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ValueError(
            f"{path.name}: made, which says where the images are from, is no JSON object; sample.py writes one, and files without it are scored too"
        )
    return made


def _header(path: Path, name: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        return HEADERS[npy.read_magic(file)](file)
    except (ValueError, KeyError):
        raise ValueError(f"{path.name}: {name} is no npy array of version 1.0 or 2.0") from None


def _image_shape(path: Path, file: BinaryIO) -> tuple[int, ...]:
    shape, fortran, dtype = _header(path, "arr_0", file)
    if dtype != np.uint8:
        raise ValueError(
            f"{path.name}: arr_0 is {dtype}; scores are of uint8 images 0..255, so quantise before writing (engine/data/quantise.py)"
        )
    if fortran or len(shape) != 4 or shape[3] != 3 or not all(shape):
        order = "Fortran-ordered " if fortran else ""
        raise ValueError(f"{path.name}: arr_0 is {order}{shape}; expected images (N, H, W, 3)")
    return shape


def _small(
    path: Path, archive: zipfile.ZipFile, name: str, kinds: str, shape: tuple[int, ...]
) -> ndarray:
    """A whole array of this kind and shape; any other is refused by its header, before room is made for it."""
    with archive.open(f"{name}.npy") as file:
        found, _, dtype = _header(path, name, file)
    if dtype.kind not in kinds or found != shape:
        raise ValueError(
            f"{path.name}: {name} is {dtype} {found}, expected {shape} of kind {' or '.join(kinds)}"
        )
    try:
        with archive.open(f"{name}.npy") as file:
            return npy.read_array(file, allow_pickle=False)
    except (ValueError, MemoryError) as error:
        raise ValueError(
            f"{path.name}: {name} is not readable ({str(error).splitlines()[0]})"
        ) from None
