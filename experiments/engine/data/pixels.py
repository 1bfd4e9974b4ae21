"""Crop a folder of class folders to one array of pixels, for networks trained on pixels."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from experiments.engine.data.checks import compare_classes, write_classes
from experiments.engine.data.pictures import (
    Pictures,
    UnreadablePicture,
    count_unreadable,
    read_picture,
)
from experiments.engine.records.files import require_space, written_whole

GROUP = 1024  # pictures that are in memory at a time


def write_pixels(pictures: Pictures, folder: Path, size: int, workers: int) -> Counter[str]:
    """Write images.npy, uint8 (M, 3, size, size), then classes.txt and labels.npy, each whole.

    Returns:
        How many pictures of other modes than RGB were converted, by PIL's name of the mode.

    Raises:
        ValueError: a picture cannot be decoded, or the folder already holds labels.npy or
            another order of the classes, or lacks space.
    """
    if (folder / "labels.npy").exists():
        raise ValueError(f"{folder / 'labels.npy'} exists already; remove it to crop anew")
    compare_classes(folder, pictures.classes)

    num = len(pictures.files)
    require_space(folder, num * (3 * size**2 + 8), "--out")
    try:
        converted = _write_images(pictures, folder / "images.npy", size, workers)
    except UnreadablePicture as error:
        counts = count_unreadable(error, pictures, size, workers)
        raise ValueError(f"{counts}; repair them, or take them out of the folder") from None

    write_classes(folder, pictures.classes)
    with written_whole(folder / "labels.npy") as file:
        np.save(file, np.asarray(pictures.labels, dtype=np.int64), allow_pickle=False)
    return converted


def _write_images(pictures: Pictures, path: Path, size: int, workers: int) -> Counter[str]:
    """Write the array of all crops; return how many were converted to RGB, by mode."""

    def read(name: str) -> tuple[np.ndarray, str]:
        return read_picture(pictures.root / name, size)

    converted: Counter[str] = Counter()
    num = len(pictures.files)
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, 3, size, size)}
    with written_whole(path) as file, ThreadPoolExecutor(workers) as threads:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, num, GROUP):
            for pixels, mode in threads.map(read, pictures.files[start : start + GROUP]):
                file.write(pixels.transpose(2, 0, 1).tobytes())
                if mode != "RGB":
                    converted[mode] += 1
    return converted
