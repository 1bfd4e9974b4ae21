"""CIFAR-10 from parquet files or torchvision's folder."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.engine.data.pictures import describe_modes

SHAPE = (32, 32, 3)


def read_cifar10(found: list[Path], split: str) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Images uint8 (M, 3, 32, 32), labels (M,), and what they were read from with a digest of it and how many were no RGB.

    `found` are parquet files, taken in their order, or one torchvision folder. ValueError in one line for what is not CIFAR-10.
    """
    if found[0].suffix == ".parquet":
        converted: Counter[str] = Counter()
        parts = [_parquet(path, converted) for path in found]
        images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        source = {"data_source": "parquet"} | (
            {"data_converted": describe_modes(converted)} if converted else {}
        )
    else:
        images, labels = _torchvision(found[0].parent, split)
        source = {"data_source": "torchvision"}
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return images, labels, source | {"data_sha256": sha256}


def file_digest(found: list[Path]) -> str:
    """SHA-256 of the bytes of what `read_cifar10` reads."""
    digest = hashlib.sha256()
    for path in found:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _parquet(path: Path, converted: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (M, 32, 32, 3) and labels (M,) of columns `img` (struct with the file's `bytes`) and `label`; counts other modes than RGB."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install -e .[data]") from None
    from PIL import Image

    try:
        table = pyarrow.parquet.read_table(path, columns=["img", "label"])
        labels = table["label"].to_numpy().astype(np.int64, casting="same_kind")
        images = np.empty((len(labels), *SHAPE), np.uint8)
        for row, cell in enumerate(table["img"]):
            try:
                with Image.open(io.BytesIO(cell["bytes"].as_py())) as image:
                    pixels, mode = np.asarray(image.convert("RGB")), image.mode
            except (
                OSError,
                SyntaxError,
                TypeError,
                ValueError,
                Image.DecompressionBombError,
            ) as error:
                raise ValueError(f"row {row} cannot be decoded: {error}") from None
            if pixels.shape != SHAPE:
                raise ValueError(
                    f"row {row} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32"
                )
            converted.update([mode] * (mode != "RGB"))
            images[row] = pixels
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path.name} is not CIFAR-10 with columns img (struct with bytes) and label: {' '.join(str(error).split())}"
        ) from None
    return images, labels


def _torchvision(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's pickles, which it unpickles only if their checksums are those of the published files."""
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(folder, train=split == "train")
    except RuntimeError:
        raise ValueError(
            "cifar-10-batches-py is not the published CIFAR-10: a file is missing or its checksum is another; remove it and download it again"
        ) from None
    return found.data, np.array(found.targets, np.int64)


def download(folder: Path) -> None:
    """Fetch torchvision's archive into `folder`. ValueError in one line where the network does not allow it."""
    from torchvision.datasets import CIFAR10

    folder.mkdir(parents=True, exist_ok=True)
    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"CIFAR-10 cannot be downloaded ({' '.join(str(error).split())}); put train.parquet and test.parquet, "
            "or torchvision's cifar-10-batches-py, in data/cifar10 (or $DICO_DATA/cifar10)"
        ) from None
