"""Read CIFAR-10 from parquet files or from torchvision's folder, or download it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.engine.data.pictures import describe_modes
from experiments.engine.machine.system_errors import explain, is_of_files
from experiments.engine.records.measured import measure_once

SHAPE = (32, 32, 3)


def read_cifar10(paths: list[Path], split: str) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Read a split of CIFAR-10.

    Args:
        paths: parquet files, read in their order, or one torchvision folder.
        split: 'train' or 'test'.

    Returns:
        Images uint8 (M, 3, 32, 32), labels (M,), and what identifies them: the kind of source, a
        digest of images and labels, and how many images were converted to RGB.

    Raises:
        ValueError: a file is not CIFAR-10.
    """
    source: dict[str, str] = {}
    if paths[0].suffix == ".parquet":
        converted: Counter[str] = Counter()
        tables = [_read_parquet(path, converted) for path in paths]
        images, labels = (np.concatenate(column) for column in zip(*tables, strict=True))
        source["data_source"] = "parquet"
        if converted:
            source["data_converted"] = describe_modes(converted)
    else:
        images, labels = _read_torchvision(paths[0].parent, split)
        source["data_source"] = "torchvision"

    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    source["data_sha256"] = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return images, labels, source


def file_digest(paths: list[Path]) -> str:
    """Digest the bytes of all files that `read_cifar10` would read, as SHA-256."""

    def digest_bytes() -> str:
        digest = hashlib.sha256()
        for path in paths:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    return str(measure_once(paths, "bytes", digest_bytes))


def _read_parquet(path: Path, converted: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read columns `img` (a struct with the image file's `bytes`) and `label`.

    Returns images (M, 32, 32, 3) and labels (M,); other modes than RGB are counted.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install -e .[data]") from None

    try:
        table = pyarrow.parquet.read_table(path, columns=["img", "label"])
        labels = table["label"].to_numpy().astype(np.int64, casting="same_kind")
        images = np.empty((len(labels), *SHAPE), np.uint8)
        for row, cell in enumerate(table["img"]):
            images[row], mode = _decode(cell["bytes"].as_py(), row)
            if mode != "RGB":
                converted[mode] += 1
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error, "read", path)) from None
        raise ValueError(
            f"{path} is not CIFAR-10 with columns img (struct with bytes) and label: "
            f"{' '.join(str(error).split())}"
        ) from None
    return images, labels


def _decode(data: bytes, row: int) -> tuple[np.ndarray, str]:
    """Decode an image file to pixels (32, 32, 3); also return its mode."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
            mode = image.mode
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"row {row} cannot be decoded: {error}") from None
    if pixels.shape != SHAPE:
        raise ValueError(f"row {row} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32")
    return pixels, mode


def _read_torchvision(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read torchvision's pickles, which it opens only if their checksums are the published ones."""
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(folder, train=split == "train")
    except RuntimeError:
        raise ValueError(
            "cifar-10-batches-py is not the published CIFAR-10: a file is missing or has another "
            "checksum; remove it and download it again"
        ) from None
    return dataset.data, np.array(dataset.targets, np.int64)


def download(folder: Path) -> None:
    """Download torchvision's archive of CIFAR-10 into a folder.

    Raises:
        ValueError: the network does not allow it.
    """
    from torchvision.datasets import CIFAR10

    folder.mkdir(parents=True, exist_ok=True)
    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error)) from None
        raise ValueError(
            f"CIFAR-10 cannot be downloaded ({' '.join(str(error).split())}); put train.parquet "
            "and test.parquet, or torchvision's cifar-10-batches-py, in data/cifar10 "
            "(or $DICO_DATA/cifar10)"
        ) from None
