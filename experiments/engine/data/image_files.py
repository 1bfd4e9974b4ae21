"""ADM-style .npz files of images `arr_0`, uint8 (N, H, W, 3), with labels `arr_1`.

Such a file may hold statistics instead (mu, sigma, mu_s, sigma_s), which `scoring/reference.py`
reads. Images are streamed, so that 50,000 of 512 x 512 need no memory. Pickles are never read.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

import numpy as np
from numpy import ndarray
from numpy.lib import format as npy

from experiments.engine.machine.system_errors import naming, require_file
from experiments.engine.records.files import file_sha256 as file_sha256  # for callers of this file
from experiments.engine.records.files import written_whole

POOL = 2048  # channels of Inception's pooled features
SPATIAL = 7 * 17 * 17  # entries of its spatial features
MADE = "made"  # name of the JSON that says where images are from
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s"}
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
Shape = tuple[int, ...]


class ImageFile:
    """The images of a file, read in batches, and what lies beside them.

    shape: (N, H, W, 3).
    stray: names of statistics that lie beside the images, which nobody reads then.
    labels: (N,), or None.
    index: each image's place in the order of generation (N,), or None.
    origin: what the sampler wrote about itself, or None.
    lossy: number of images of each lossy format: none, whatever they were before.
    """

    lossy: Mapping[str, int] = MappingProxyType({})

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            ValueError: the file is damaged, holds no images, or images of another type or shape.
        """
        self.path = path
        with open_archive(path) as archive:
            names = array_names(archive)
            if "arr_0" not in names:
                raise ValueError(
                    f"{path}: holds no images (arr_0), only {', '.join(names) or 'nothing'}"
                )
            self.stray = sorted(STATISTICS & set(names))
            with archive.open("arr_0.npy") as file:
                self.shape = _read_image_shape(path, file)
            num = self.shape[:1]
            self.labels = _read_if_there(path, archive, "arr_1", "iu", num)
            self.index = _read_if_there(path, archive, "index", "iu", num)
            self.origin = _read_made(path, archive)
        for name, numbers in (("arr_1", self.labels), ("index", self.index)):
            if numbers is not None and numbers.min() < 0:
                raise ValueError(
                    f"{path}: {name} holds {numbers.min()}; labels and indices count from 0"
                )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = 64) -> Iterator[ndarray]:
        """Read all images, uint8 (n, H, W, 3), `size` at a time, in file order."""
        with open_archive(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_image_shape(self.path, file)
            for start in range(0, len(self), size):
                yield self._read_next(file, start, min(start + size, len(self)))

    def read(self, start: int, stop: int) -> ndarray:
        """Read the images from `start` to before `stop`, uint8 (n, H, W, 3)."""
        with open_archive(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_image_shape(self.path, file)
            file.seek(start * math.prod(self.shape[1:]), 1)
            return self._read_next(file, start, stop)

    def _read_next(self, file: IO[bytes], start: int, stop: int) -> ndarray:
        """Read images from an open file that stands at image `start`."""
        size = (stop - start) * math.prod(self.shape[1:])
        data = bytearray()
        while len(data) < size:
            more = file.read(size - len(data))
            if not more:
                raise ValueError(f"{self.path}: cut short after {start} of {len(self)} images")
            data += more
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])


def has_images(path: Path) -> bool:
    """Tell whether a file holds images; ValueError if it is not readable."""
    with open_archive(path) as archive:
        return "arr_0" in array_names(archive)


def read_origin(path: Path) -> dict[str, Any]:
    """Return what a file says of how it was made, {} if it says nothing."""
    with open_archive(path) as archive:
        return _read_made(path, archive) or {}


class SeededImages(Protocol):
    """Images that may say from which seeds they are; the fields are those of `ImageFile`."""

    @property
    def path(self) -> Path: ...
    @property
    def labels(self) -> ndarray | None: ...
    @property
    def index(self) -> ndarray | None: ...
    @property
    def origin(self) -> dict[str, Any] | None: ...


def find_common_order(a: SeededImages, b: SeededImages) -> tuple[ndarray, ndarray]:
    """Return the rows of both files in the order of generation.

    Raises:
        ValueError: unless both come from the same seeds and labels.
    """
    # Both files must say how they were made.
    for images in (a, b):
        seeded = images.origin is not None and images.origin.get("seed") is not None
        if images.index is None or images.labels is None or not seeded:
            raise ValueError(
                f"{images.path} does not say from which seeds it was made; "
                "pairs need files that sample.py wrote"
            )

    # The rows are paired by seed, and so must be of the same seeds and labels.
    rows_a, rows_b = (_order_of_generation(images) for images in (a, b))
    if not _are_of_common_seeds(a, b, rows_a, rows_b):
        raise ValueError(
            f"{a.path} and {b.path} were made from different seeds or labels: compare them unpaired"
        )
    return rows_a, rows_b


def _order_of_generation(images: SeededImages) -> ndarray:
    assert images.index is not None
    return images.index.argsort()


def _are_of_common_seeds(
    a: SeededImages, b: SeededImages, rows_a: ndarray, rows_b: ndarray
) -> bool:
    """Return whether two files were made from the same seeds and labels, in these orders."""
    assert a.origin and b.origin and a.index is not None and b.index is not None
    assert a.labels is not None and b.labels is not None
    return (
        a.origin["seed"] == b.origin["seed"]
        and np.array_equal(a.index[rows_a], b.index[rows_b])
        and np.array_equal(a.labels[rows_a], b.labels[rows_b])
    )


def write_images(
    path: Path,
    images: Iterable[ndarray],
    shape: Shape,
    labels: ndarray,
    index: ndarray,
    origin: dict[str, Any],
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: the file.
        images: batches, uint8 (n, H, W, 3), that add up to `shape`.
        shape: (N, H, W, 3).
        labels: (N,).
        index: each image's place in the order of generation, (N,).
        origin: what the sampler says about itself.
    """
    with (
        written_whole(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        # Images first, as they come.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            for batch in images:
                member.write(np.ascontiguousarray(batch).tobytes())

        made = np.array(json.dumps(origin, sort_keys=True))
        for name, array in (("arr_1", labels), ("index", index), ("made", made)):
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, np.asarray(array), allow_pickle=False)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Let every ValueError within begin with the path of the file that it is about."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if not message.startswith((path.name, str(path))):
            message = f"{path}: {message}"
        raise ValueError(message) from None


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; ValueError if it is missing, or turns out to be damaged while it is read."""
    require_file(path, "file", "give the path of an .npz")
    try:
        with naming("read", path), zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip() or "cut short"
        raise ValueError(
            f"{path}: not a readable .npz ({reason}): damaged, a download page, a git-lfs pointer?"
        ) from None


def array_names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _read_made(path: Path, archive: zipfile.ZipFile) -> dict[str, Any] | None:
    made = _read_if_there(path, archive, MADE, "U", ())
    return None if made is None else parse_origin(path, str(made))


def parse_origin(path: Path, text: str) -> dict[str, Any]:
    """Return what a sampler wrote of itself; ValueError if it is no JSON object."""
    try:
        origin = json.loads(text)
    except (ValueError, RecursionError):
        origin = None
    if not isinstance(origin, dict):
        raise ValueError(
            f"{path}: made, which says where the images are from, is no JSON object; "
            "sample.py writes one, and files without it are scored too"
        )
    return origin


def _read_header(path: Path, name: str, file: IO[bytes]) -> tuple[Shape, bool, np.dtype]:
    """Read shape, whether the order is Fortran's, and type of an array."""
    try:
        return HEADERS[npy.read_magic(file)](file)
    except (ValueError, KeyError):
        raise ValueError(f"{path}: {name} is no npy array of version 1.0 or 2.0") from None


def _read_image_shape(path: Path, file: IO[bytes]) -> Shape:
    shape, fortran, dtype = _read_header(path, "arr_0", file)
    if dtype != np.uint8:
        raise ValueError(
            f"{path}: arr_0 is {dtype}; scores are of uint8 images 0..255, so quantise before "
            "writing (engine/data/quantise.py)"
        )
    if fortran or len(shape) != 4 or shape[3] != 3 or not all(shape):
        order = "Fortran-ordered " if fortran else ""
        raise ValueError(f"{path}: arr_0 is {order}{shape}; expected images (N, H, W, 3)")
    return shape


def _read_if_there(
    path: Path, archive: zipfile.ZipFile, name: str, kinds: str, shape: Shape
) -> ndarray | None:
    """Read an array that a file may lack."""
    if name not in array_names(archive):
        return None
    return read_small_array(path, archive, name, kinds, shape)


def read_small_array(
    path: Path, archive: zipfile.ZipFile, name: str, kinds: str, shape: Shape
) -> ndarray:
    """Read a whole array of these kinds and this shape.

    Any other array is refused by its header, before memory is allocated for it.
    """
    with archive.open(f"{name}.npy") as file:
        stored, _, dtype = _read_header(path, name, file)
    if dtype.kind not in kinds or stored != shape:
        raise ValueError(
            f"{path}: {name} is {dtype} {stored}, expected {shape} of kind {' or '.join(kinds)}"
        )
    try:
        with archive.open(f"{name}.npy") as file:
            return npy.read_array(file, allow_pickle=False)
    except (ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: {name} is not readable ({reason})") from None
