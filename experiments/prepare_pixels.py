"""Crop a folder of class folders to pixels once: `python experiments/prepare_pixels.py --size 64 --images ILSVRC/train`.

ADM's networks are trained on pixels, each at its own size: under imagenet256_own those of 64 and 256, under imagenet512_own
of 128 and 512. Crops as ADM does; a file that cannot be decoded ends it. Writes images.npy, uint8 (M, 3, size, size), and
labels.npy to $DICO_DATA/imagenet<size>_pixels (or --out), whole or not at all: ImageNet takes 16 GB at 64 pixels, 252 GB at 256.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.declared.recipes import pixels
from experiments.engine.cli import Parser, run_command
from experiments.engine.data.locate import folder_of
from experiments.engine.records.files import written_whole


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", required=True, type=int, choices=(64, 128, 256, 512), help="pixels a side"
    )
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        help="folder that holds one folder of images for each of the 1000 classes",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the two files go (default: $DICO_DATA/imagenet<size>_pixels, or data/imagenet<size>_pixels)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="threads that decode and crop (default: the cores)",
    )
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    num, converted = prepare(
        args.images,
        args.out or folder_of(pixels(args.size)),
        args.size,
        pixels(args.size).num_classes,
        args.workers,
    )
    print(
        f"{num} images of {args.size} x {args.size} pixels; converted to RGB: {converted or 'none'}"
    )
    return 0


def prepare(images: Path, out: Path, size: int, num_classes: int, workers: int) -> tuple[int, str]:
    """Write both files, the images first; returns their number, and that of images of other modes than RGB. ValueError in one line for what cannot be read or is there already."""
    import numpy as np

    from experiments.engine.data.pictures import describe_modes, find_pictures, read_picture

    if (out / "labels.npy").exists():
        raise ValueError(f"{out / 'labels.npy'} is there already; remove it to crop anew")
    found, converted = find_pictures(images, num_classes), Counter()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(found.files), 3, size, size)}
    with written_whole(out / "images.npy") as file, ThreadPoolExecutor(workers) as threads:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, len(found.files), 1024):
            for picture, mode in threads.map(
                lambda name: read_picture(found.root / name, size),
                found.files[start : start + 1024],
            ):
                file.write(picture.transpose(2, 0, 1).tobytes())
                converted.update([mode] * (mode != "RGB"))
    with written_whole(out / "labels.npy") as file:
        np.save(file, np.asarray(found.labels, dtype=np.int64), allow_pickle=False)
    return len(found.files), describe_modes(converted)


if __name__ == "__main__":
    raise SystemExit(main())
