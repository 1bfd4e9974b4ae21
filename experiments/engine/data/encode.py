"""Latents from pictures: any number of processes share the work, shard by shard, and any of them may be killed.

A shard is claimed by a lock that dies with its process, is written whole, and counts once its .json stands beside it.
plan.json says what the folder is being filled with; manifest.json, written last, what it was filled with.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.engine.data.autoencoder import PUBLISHED, Autoencoder
from experiments.engine.data.latents import SCALE, shard_path
from experiments.engine.data.pictures import Pictures, read_picture
from experiments.engine.data.quantise import from_uint8
from experiments.engine.data.sets import prefetch
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.records.files import locked, try_lock, written_whole

Report = Callable[[int, int], None]

# Of unscaled latents of ImageNet's training set at 256 pixels under sd-vae-ft-ema and -mse, whose encoders are one.
# Source: the constants of improved MeanFlow's ImageNet-256 code. EDM2's differ: its training/encoders.py gives the VAE pixels in [0, 1].
MEAN, DEVIATION = (
    (0.86488, -0.27787343, 0.21616915, 0.3738409),
    (4.85503674, 5.31922414, 3.93725398, 3.9870003),
)


@dataclass(frozen=True)
class EncodingJob:
    """What is made of which pictures. `skip` goes on past files that cannot be decoded, and names them in the manifest."""

    pictures: Pictures
    vae: Autoencoder
    size: int
    latents: str = "moments"
    shard: int = 1024
    skip: bool = False
    workers: int = 2

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.pictures.files) / self.shard)

    @property
    def stored(self) -> tuple[int, int, int, int]:
        """Shape of one picture's row."""
        side = self.size // self.vae.factor
        return 2, self.vae.channels * (2 if self.latents == "moments" else 1), side, side

    def plan(self) -> dict[str, Any]:
        """Everything that decides the files' bits. `listing` digests the pictures' names and classes."""
        import diffusers
        import PIL

        return {
            "latents": self.latents,
            "shape": list(self.stored),
            "pixels": self.size,
            "num_classes": len(self.pictures.classes),
            "num_files": len(self.pictures.files),
            "listing": hashlib.sha256("\n".join(self.pictures.files).encode()).hexdigest()[:16],
            "shard": self.shard,
            "vae": {
                "name": self.vae.name,
                "encoder": self.vae.encoder,
                "weights": self.vae.weights,
                "scale": SCALE,
            },
            "crop": "ADM centre crop: box halving, bicubic, middle",
            "precision": "fp32",
            "device": self.vae.device.type,
            "batch": self.vae.batch,
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "pillow": PIL.__version__,
            },
        }


def encode_pictures(work: EncodingJob, folder: Path, report: Report) -> dict[str, Any]:
    """Make every shard that is missing and nobody else is making, wait for the others, and return the manifest.

    `report(done, total)` counts pictures of all processes. ValueError in one line for what the folder or a picture refuses.
    """
    if work.size % work.vae.factor or work.latents not in ("moments", "fixed"):
        raise ValueError(
            f"{work.size} pixels as {work.latents!r}: the size must be a multiple of {work.vae.factor}, the latents 'moments' or 'fixed'"
        )
    _agree(work.plan(), folder)
    _require_space(work, folder)
    report(_made(work, folder), len(work.pictures.files))
    for wait in (False, True):
        for number in range(work.num_shards):
            if _done(folder, number):
                continue
            with locked(_lock(folder, number)) if wait else try_lock(_lock(folder, number)) as mine:
                if (mine or wait) and not _done(folder, number):
                    _make(work, folder, number)
            report(_made(work, folder), len(work.pictures.files))
    return _finish(work, folder)


def _agree(plan: dict[str, Any], folder: Path) -> None:
    """The first process writes the plan; the others, and later runs, must have the same."""
    with locked(folder / "plan.lock"):
        path = folder / "plan.json"
        if not path.exists():
            _write_json(path, plan)
        found = json.loads(path.read_text())
    if changed := [
        f"{name} {found.get(name)} there, {plan[name]} here"
        for name in plan
        if found.get(name) != plan[name]
    ]:
        raise ValueError(
            f"{folder} is being filled otherwise: {'; '.join(changed)}; name another --out or remove the folder"
        )


def _require_space(work: EncodingJob, folder: Path) -> None:
    needed = (len(work.pictures.files) - _made(work, folder)) * math.prod(work.stored) * 4
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free; name another --out"
        )


def _made(work: EncodingJob, folder: Path) -> int:
    """Pictures of the shards that are done, by whomever."""
    return sum(
        min(work.shard, len(work.pictures.files) - number * work.shard)
        for number in range(work.num_shards)
        if _done(folder, number)
    )


def _make(work: EncodingJob, folder: Path, number: int) -> None:
    """Encode one shard. Its .npy is written first and its .json last, each whole."""
    path, first = shard_path(folder, number), number * work.shard
    for stale in folder.glob(
        f".{path.stem}.*.tmp"
    ):  # we hold the lock: whoever wrote it was killed
        stale.unlink()
    indices, skipped, converted = [], {}, Counter()
    rows = np.empty((min(work.shard, len(work.pictures.files) - first), *work.stored), np.float32)
    sums = np.zeros((2, work.vae.channels))
    for index, moments in _encoded(work, first, len(rows), skipped, converted):
        sums += _sums(moments)
        rows[len(indices)] = moments if work.latents == "moments" else _sampled(moments, index)
        indices.append(index)
    with written_whole(path) as file:
        np.save(file, rows[: len(indices)])
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    labels = [work.pictures.labels[index] for index in indices]
    _write_json(
        path.with_suffix(".json"),
        {
            "labels": labels,
            "skipped": skipped,
            "converted": converted,
            "sums": sums.tolist(),
            "sha256": sha256,
        },
    )


def _encoded(
    work: EncodingJob, first: int, num: int, skipped: dict[str, str], converted: Counter[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """Index and moments (2, 2C, h, w) of each picture and its flip; those that cannot be decoded are named in `skipped`, other modes than RGB counted."""

    def read(index: int) -> tuple[np.ndarray, str] | str:
        name = work.pictures.files[index]
        try:
            return read_picture(work.pictures.root / name, work.size)
        except ValueError as error:
            if not work.skip:
                raise ValueError(
                    f"{error}; --corrupt skip leaves such files out and counts them"
                ) from None
            return str(error)

    group: list[tuple[int, np.ndarray]] = []

    def flush() -> Iterator[tuple[int, np.ndarray]]:
        images = from_uint8(torch.from_numpy(np.stack([pixels for _, pixels in group]))).permute(
            0, 3, 1, 2
        )
        moments = (
            work.vae.moments(torch.stack([images, images.flip(-1)], 1).flatten(0, 1))
            .unflatten(0, (-1, 2))
            .numpy()
        )
        yield from zip([index for index, _ in group], moments, strict=True)
        group.clear()

    indices = range(first, first + num)
    for index, found in zip(
        indices,
        prefetch(read, indices, work.workers, 4 * max(work.workers, work.vae.batch)),
        strict=True,
    ):
        if isinstance(found, str):
            skipped[work.pictures.files[index]] = found
            continue
        pixels, mode = found
        converted.update([mode] * (mode != "RGB"))
        group.append((index, pixels))
        if len(group) * 2 >= work.vae.batch:
            yield from flush()
    if group:
        yield from flush()


def _sampled(moments: np.ndarray, index: int) -> np.ndarray:
    """One posterior sample of the picture and one of its flip (2, C, h, w), scaled, drawn from the picture's place in the listing."""
    mean, deviation = np.split(moments, 2, axis=1)
    noise = torch.randn(mean.shape, generator=generator_at("fixed latent", index)).numpy()
    return (mean + deviation * noise) * np.float32(SCALE)


def _sums(moments: np.ndarray) -> np.ndarray:
    """Sum over rows and places of the latent and of its square's expectation, a channel: (2, C), float64."""
    mean, deviation = np.split(moments.astype(np.float64), 2, axis=1)
    return np.stack([mean.sum((0, 2, 3)), (mean**2 + deviation**2).sum((0, 2, 3))])


def _finish(work: EncodingJob, folder: Path) -> dict[str, Any]:
    """labels.npy and the manifest from the shards' own records; whoever ends last writes them, and all would write the same."""
    parts = [
        json.loads(shard_path(folder, number).with_suffix(".json").read_text())
        for number in range(work.num_shards)
    ]
    labels = np.array([label for part in parts for label in part["labels"]], np.int64)
    if empty := sorted(set(range(len(work.pictures.classes))) - set(labels.tolist())):
        raise ValueError(
            f"no image of {work.pictures.classes[empty[0]]} could be decoded, nor of {len(empty) - 1} other classes; repair them and remove {folder}"
        )
    skipped = {name: reason for part in parts for name, reason in part["skipped"].items()}
    modes = [
        part.get("converted") for part in parts
    ]  # shards that were made before modes were counted do not say
    converted = {} if None in modes else {"converted": sum(map(Counter, modes), Counter())}
    count = len(labels) * 2 * work.stored[-1] ** 2
    mean, square = sum(np.array(part["sums"]) for part in parts) / count
    deviation = np.sqrt(square - mean**2)
    manifest = json.loads((folder / "plan.json").read_text()) | {
        "num_images": len(labels),
        "shards": [len(part["labels"]) for part in parts],
        "skipped": skipped,
        **converted,
        "sha256": hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest(),
        "statistics": compare_statistics(mean, deviation, len(labels), work.size),
    }
    if work.vae.name in PUBLISHED and not manifest["statistics"]["as_expected"]:
        raise ValueError(
            f"{describe_statistics(manifest['statistics'])}: the pictures or the VAE are not what their names say"
        )
    with locked(folder / "plan.lock"):
        with written_whole(folder / "labels.npy") as file:
            np.save(file, labels)
        _write_json(folder / "manifest.json", manifest)
    for number in range(work.num_shards):
        _lock(folder, number).unlink(missing_ok=True)
    return manifest


def compare_statistics(
    mean: np.ndarray, deviation: np.ndarray, num_images: int, pixels: int
) -> dict[str, Any]:
    """Per-channel statistics beside sd-vae-ft's, and whether every channel agrees within the tolerance.

    The tolerance, in expected deviations, is 0.05 at the 256 pixels of the published values and 0.15 at other sizes,
    plus four standard errors of a mean over `num_images`, whose own means stray by less than one deviation. It is never
    above 0.25: a few hundred pictures are too few to tell.
    """
    tolerance = min((0.05 if pixels == 256 else 0.15) + 4 / math.sqrt(num_images), 0.25)
    known = len(mean) == len(MEAN)
    off = (
        max(np.abs(np.concatenate([mean - MEAN, deviation - DEVIATION])) / np.tile(DEVIATION, 2))
        if known
        else math.inf
    )
    return {
        "mean": [round(float(value), 5) for value in mean],
        "deviation": [round(float(value), 5) for value in deviation],
        "expected_mean": list(MEAN),
        "expected_deviation": list(DEVIATION),
        "tolerance": round(tolerance, 4),
        "as_expected": bool(off <= tolerance),
    }


def describe_statistics(statistics: dict[str, Any]) -> str:
    """The comparison in a line."""
    verdict = "agree with" if statistics["as_expected"] else "differ from"
    shown = "; ".join(
        f"{what} {', '.join(f'{value:.3f}' for value in statistics[what])}"
        for what in ("mean", "deviation")
    )
    expected = "; ".join(
        ", ".join(f"{value:.3f}" for value in statistics[f"expected_{what}"])
        for what in ("mean", "deviation")
    )
    return f"latent statistics ({shown}) {verdict} sd-vae-ft's ({expected}; tolerance {statistics['tolerance']} deviations)"


def _done(folder: Path, number: int) -> bool:
    return shard_path(folder, number).with_suffix(".json").exists()


def _lock(folder: Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".lock")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
