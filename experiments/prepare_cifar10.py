"""Download CIFAR-10 and check it: `python experiments/prepare_cifar10.py`. It goes to $DICO_DATA/cifar10, or data/cifar10.

Where the network allows no download, put there train.parquet and test.parquet (columns `img`, a struct with the image
file's `bytes`, and `label`) or torchvision's cifar-10-batches-py; this command then only reads them.
"""

from __future__ import annotations

import argparse

from experiments.engine import sources
from experiments.engine.cli import Parser, guarded


def main() -> int:
    return guarded(_main, str)


def _main() -> int:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from experiments.engine.cifar import download, read_cifar10

    folder = sources.ROOT / "cifar10"
    if not sources.find_cifar10(folder, "train"):
        download(folder)
    for split in ("train", "test"):
        if found := sources.find_cifar10(folder, split):
            images, _, identity = read_cifar10(found, split)
            print(f"{split}: {len(images)} images from {identity['data_source']}, sha256 {identity['data_sha256'][:16]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
