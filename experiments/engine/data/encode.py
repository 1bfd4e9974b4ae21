"""Encode pictures to latents; any number of processes share the work, and any may be killed.

The work is cut into shards. A lock that dies with its process claims a shard. A shard is written
whole, and counts once its .json stands beside it. plan.json says what the folder is being filled
with; manifest.json, written last, what it was filled with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.engine.data.autoencoder import PUBLISHED, Autoencoder
from experiments.engine.data.autoencoders.spaces import describe_space, space_of_statistics
from experiments.engine.data.captioned.pictures import CaptionIndex
from experiments.engine.data.checks import check_latents, compare_classes, write_classes
from experiments.engine.data.latent_statistics import (
    compare_statistics,
    describe_statistics,
    sum_moments,
)
from experiments.engine.data.latents import draw_fixed, shard_path
from experiments.engine.data.pictures import (
    Crop,
    Pictures,
    UnreadablePicture,
    count_unreadable,
    read_picture,
    show_name,
)
from experiments.engine.data.quantise import from_uint8
from experiments.engine.data.sets import prefetch
from experiments.engine.records.files import (
    file_sha256,
    locked,
    read_json,
    require_space,
    try_lock,
    written_whole,
)
from experiments.engine.specs.latent_space import SD_SPACE
from experiments.engine.specs.spec import LATENT_CHANNELS

REPEAT = "remove the folder and prepare the latents again"

Report = Callable[[int, int], None]  # hears how many pictures are done, of how many


@dataclass(frozen=True)
class EncodingJob:
    """Which pictures become which latents.

    pictures: what is encoded.
    vae: what encodes.
    size: side of the crops in pixels.
    latents: 'moments' of the posteriors, or 'fixed' samples of them.
    shard: pictures in a shard.
    skip: whether to leave out files that cannot be decoded; the manifest names them.
    workers: threads that decode and crop.
    crop: how pictures become squares.
    captions: which captions the pictures have, whose places the labels then are.
    """

    pictures: Pictures
    vae: Autoencoder
    size: int
    latents: str = "moments"
    shard: int = 1024
    skip: bool = False
    workers: int = 2
    crop: Crop = Crop.ADM
    captions: CaptionIndex | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(len(self.pictures.files) / self.shard)

    @property
    def stored(self) -> tuple[int, int, int, int]:
        """Shape of one picture's row in a shard."""
        side = self.size // self.vae.factor
        channels = 2 * self.vae.channels if self.latents == "moments" else self.vae.channels
        return 2, channels, side, side

    def pictures_in(self, number: int) -> range:
        """Indices of the pictures of a shard."""
        start = number * self.shard
        return range(start, min(start + self.shard, len(self.pictures.files)))

    def plan(self) -> dict[str, Any]:
        """Everything that decides the files' bits; 'listing' digests the names of the pictures."""
        import diffusers
        import PIL

        listing = hashlib.sha256(b"\n".join(map(os.fsencode, self.pictures.files)))
        captions = {} if self.captions is None else {"captions": self.captions.sha256}
        return captions | {
            "latents": self.latents,
            "shape": list(self.stored),
            "pixels": self.size,
            "num_classes": len(self.captions or self.pictures.classes),
            "num_files": len(self.pictures.files),
            "listing": listing.hexdigest()[:16],
            "shard": self.shard,
            "vae": {
                "name": self.vae.name,
                "encoder": self.vae.encoder,
                "weights": self.vae.weights,
                **describe_space(self.vae.space, self.vae.factor),
                # Rounded weights are said in what is made of them.
                **({"warnings": list(self.vae.warnings)} if self.vae.warnings else {}),
            },
            "crop": self.crop.value,
            "precision": "fp32",
            "device": self.vae.device.type,
            "batch": self.vae.batch,
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "pillow": PIL.__version__,
            },
        }


@dataclass
class ShardNotes:
    """What is noted while a shard is encoded.

    indices: pictures that were encoded, in the order of their rows.
    skipped: why a picture was left out, by its name.
    unreadable: how many were left out, by reason.
    converted: how many pictures of other modes than RGB were converted, by mode.
    """

    indices: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)


def encode_pictures(job: EncodingJob, folder: Path, report: Report) -> dict[str, Any]:
    """Encode every shard that is missing and that no other process encodes; wait for the others.

    `report` counts the pictures of all processes.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder is being filled with something else or lacks space, or a picture
            cannot be decoded.
    """
    if job.size % job.vae.factor or job.latents not in ("moments", "fixed"):
        raise ValueError(
            f"{job.size} pixels as {job.latents!r}: the size must be a multiple of "
            f"{job.vae.factor}, the latents 'moments' or 'fixed'"
        )
    if job.vae.space is None and job.latents == "fixed":
        raise ValueError(
            f"latents of {job.vae.name} are seen by the statistics of the whole set, which fixed "
            "samples do not wait for; prepare moments"
        )
    compare_classes(folder, job.pictures.classes)
    agree_on_plan(job.plan(), folder)
    _require_space(job, folder)
    report(_num_done(job, folder), len(job.pictures.files))

    # First encode what nobody else does, then wait for the others, whose locks a kill releases.
    try:
        for wait in (False, True):
            for number in range(job.num_shards):
                if _is_done(folder, number):
                    continue
                _encode_shard_once(job, folder, number, wait)
                report(_num_done(job, folder), len(job.pictures.files))
    except UnreadablePicture as error:
        counts = count_unreadable(error, job.pictures, job.size, job.workers)
        raise ValueError(
            f"{counts}; --corrupt skip leaves such files out and counts them"
        ) from None
    return _finish(job, folder)


def agree_on_plan(plan: dict[str, Any], folder: Path) -> None:
    """Write the plan if this process is the first; other processes must have the same."""
    with locked(folder / "plan.lock"):
        path = folder / "plan.json"
        if not path.exists():
            write_json(path, plan)
        there = read_json(path, REPEAT)
    changed = [
        f"{name} {there.get(name)} there, {plan[name]} here"
        for name in plan
        if there.get(name) != plan[name]
    ]
    if changed:
        raise ValueError(
            f"{folder} is being filled otherwise: {'; '.join(changed)}; name another --out or "
            "remove the folder"
        )


def _require_space(job: EncodingJob, folder: Path) -> None:
    pictures = len(job.pictures.files) - _num_done(job, folder)
    needed = pictures * math.prod(job.stored) * 4
    require_space(folder, needed, "--out")


def _num_done(job: EncodingJob, folder: Path) -> int:
    """Number of pictures in shards that are done, by any process."""
    done = (number for number in range(job.num_shards) if _is_done(folder, number))
    return sum(len(job.pictures_in(number)) for number in done)


def _encode_shard_once(job: EncodingJob, folder: Path, number: int, wait: bool) -> None:
    """Encode a shard unless another process does; with `wait`, only once that one has ended."""
    path = _lock_path(folder, number)
    if wait:
        with locked(path):
            if not _is_done(folder, number):
                _encode_shard(job, folder, number)
    else:
        with try_lock(path) as mine:
            if mine and not _is_done(folder, number):
                _encode_shard(job, folder, number)


def _encode_shard(job: EncodingJob, folder: Path, number: int) -> None:
    """Encode one shard; its .npy is written first and its .json last, each whole."""
    # This process holds the lock, so whoever wrote these was killed.
    path = shard_path(folder, number)
    for stale in folder.glob(f".{path.stem}.*.tmp"):
        stale.unlink()

    notes = ShardNotes()
    rows = np.empty((len(job.pictures_in(number)), *job.stored), np.float32)
    sums = np.zeros((2, job.vae.channels))
    for index, moments in _encode(job, job.pictures_in(number), notes):
        sums += sum_moments(moments)
        fixed = job.latents == "fixed"
        rows[len(notes.indices)] = draw_fixed(moments, index, job.vae.space) if fixed else moments
        notes.indices.append(index)

    with written_whole(path) as file:
        np.save(file, rows[: len(notes.indices)])
    check_latents(path, rows[: len(notes.indices)], job.latents)
    write_json(
        path.with_suffix(".json"),
        {
            "labels": [job.pictures.labels[index] for index in notes.indices],
            "skipped": notes.skipped,
            "unreadable": notes.unreadable,
            "converted": notes.converted,
            "sums": sums.tolist(),
            "sha256": file_sha256(path),
        },
    )


def _encode(
    job: EncodingJob, indices: range, notes: ShardNotes
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield index and moments (2, 2C, h, w) of each picture and its flip."""

    def read(index: int) -> tuple[np.ndarray, str] | UnreadablePicture:
        """Pixels and mode of a picture, or why it is left out."""
        try:
            path = job.pictures.root / job.pictures.files[index]
            return read_picture(path, job.size, job.crop)
        except UnreadablePicture as error:
            if job.skip:
                return error
            raise

    depth = 4 * max(job.workers, job.vae.batch)
    group: list[tuple[int, np.ndarray]] = []
    for index, picture in zip(indices, prefetch(read, indices, job.workers, depth), strict=True):
        if isinstance(picture, UnreadablePicture):
            notes.skipped[job.pictures.files[index]] = str(picture)
            notes.unreadable[picture.reason] += 1
            continue
        pixels, mode = picture
        if mode != "RGB":
            notes.converted[mode] += 1

        # A picture and its flip are two rows of the VAE's batch.
        group.append((index, pixels))
        if len(group) * 2 >= job.vae.batch:
            yield from _encode_group(job.vae, group)
            group = []
    if group:
        yield from _encode_group(job.vae, group)


def _encode_group(
    vae: Autoencoder, group: list[tuple[int, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield index and moments (2, 2C, h, w) of pictures (size, size, 3) and their flips."""
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in group]))
    images = from_uint8(pixels).permute(0, 3, 1, 2)  # (n, 3, size, size)
    pairs = torch.stack([images, images.flip(-1)], 1).flatten(0, 1)  # (2n, 3, size, size)
    moments = vae.moments(pairs).unflatten(0, (-1, 2)).numpy()  # (n, 2, 2C, h, w)
    for (index, _), rows in zip(group, moments, strict=True):
        yield index, rows


def _finish(job: EncodingJob, folder: Path) -> dict[str, Any]:
    """Write labels.npy and the manifest from the shards' .json files.

    The process that ends last writes them; all would write the same.
    """
    shards = [
        read_json(shard_path(folder, number).with_suffix(".json"), REPEAT)
        for number in range(job.num_shards)
    ]
    labels = np.array([label for shard in shards for label in shard["labels"]], np.int64)
    _require_every_class(job, labels, folder)
    manifest = read_json(folder / "plan.json", REPEAT) | _summary(job, shards, labels)
    if job.vae.name in PUBLISHED and not manifest["statistics"]["as_expected"]:
        raise ValueError(
            f"{describe_statistics(manifest['statistics'])}: the pictures or the VAE are not what "
            "their names say"
        )

    with locked(folder / "plan.lock"):
        write_classes(folder, job.pictures.classes)
        with written_whole(folder / "labels.npy") as file:
            np.save(file, labels)
        write_json(folder / "manifest.json", manifest)
    for number in range(job.num_shards):
        _lock_path(folder, number).unlink(missing_ok=True)
    return manifest


def _require_every_class(job: EncodingJob, labels: np.ndarray, folder: Path) -> None:
    empty = sorted(set(range(len(job.pictures.classes))) - set(labels.tolist()))
    if empty:
        raise ValueError(
            f"no image of {show_name(job.pictures.classes[empty[0]])} could be decoded, nor of "
            f"{len(empty) - 1} other classes; repair them and remove {folder}"
        )


def _summary(job: EncodingJob, shards: list[dict[str, Any]], labels: np.ndarray) -> dict[str, Any]:
    """Return what the manifest says beyond the plan."""
    summary: dict[str, Any] = {
        "num_images": len(labels),
        "shards": [len(shard["labels"]) for shard in shards],
        "skipped": {name: why for shard in shards for name, why in shard["skipped"].items()},
    }

    # Shards that were made before modes and reasons were counted do not say.
    reasons = (Counter(shard.get("unreadable", {})) for shard in shards)
    summary["unreadable"] = sum(reasons, Counter())
    modes = [shard.get("converted") for shard in shards]
    if None not in modes:
        summary["converted"] = sum(map(Counter, modes), Counter())

    # Means over all images, their flips and all places.
    count = len(labels) * 2 * job.stored[-1] ** 2
    sums = (np.array(shard["sums"]) for shard in shards)
    mean, square = sum(sums, start=np.zeros((2, job.vae.channels))) / count
    deviation = np.sqrt(square - mean**2)
    digests = "".join(shard["sha256"] for shard in shards)
    summary["sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    # Captioned pictures are not ImageNet's, and their rule has a factor of its own.
    known = job.captions is not None or job.vae.space == SD_SPACE
    known = known and job.vae.channels == LATENT_CHANNELS
    pixels = job.size if job.captions is None else None
    summary["statistics"] = compare_statistics(mean, deviation, len(labels), pixels, known)

    # Latents without a scale of their own are seen by the statistics of this very set.
    if job.vae.space is None:
        space = space_of_statistics(mean, deviation, job.vae.factor)
        summary["vae"] = job.plan()["vae"] | space.describe()
    return summary


def _is_done(folder: Path, number: int) -> bool:
    return shard_path(folder, number).with_suffix(".json").exists()


def _lock_path(folder: Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".lock")


def write_json(path: Path, value: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
