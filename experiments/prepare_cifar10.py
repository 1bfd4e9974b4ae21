"""Download CIFAR-10 and check it: `python experiments/prepare_cifar10.py`. It goes to $DICO_DATA/cifar10, or data/cifar10.

Where the network allows no download, put there train.parquet and test.parquet (columns `img`, a struct with the image
file's `bytes`, and `label`) or torchvision's cifar-10-batches-py; this command then only reads them.
"""

from __future__ import annotations

import argparse

from experiments.declared.protocols import CIFAR10
from experiments.engine.cli import Parser, run_command
from experiments.engine.data import locate as sources


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from experiments.engine.data.cifar10 import download
    from experiments.engine.data.sets import load_cifar10

    folder = sources.folder_of(CIFAR10.data)
    if not sources.find_cifar10(folder, "train"):
        download(folder)
    for split in ("train", "test"):
        if sources.find_cifar10(folder, split):
            images = load_cifar10(CIFAR10.data, split)
            converted = (
                f"; converted to RGB: {images.identity['data_converted']}"
                if "data_converted" in images.identity
                else ""
            )
            print(
                f"{split}: {len(images)} images from {images.identity['data_source']}, sha256 {images.identity['data_sha256'][:16]}{converted}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
