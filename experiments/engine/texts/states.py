"""States of captions on disk: memory-mapped shards that a text encoder fills once.

A shard is shard-<number>.npy, float16 (n, L, K): the states of all tokens of a caption, padding
too. The last row of all is the null caption, an empty text. A shard counts once its .json stands
beside it; manifest.json is written last.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backbones
from backbones import kernels
from experiments.engine.data.captioned.folders import MANIFEST, read_captions_manifest
from experiments.engine.data.captioned.pictures import IMAGES, STARTS, TEXTS
from experiments.engine.data.checks import open_array
from experiments.engine.data.encode import agree_on_plan, write_json
from experiments.engine.data.latents import shard_path
from experiments.engine.records.files import file_sha256, read_json, require_space, written_whole
from experiments.engine.specs.spec import Data
from experiments.engine.texts.annotations import Annotations
from experiments.engine.texts.encoder import TextEncoder

REPEAT = "remove the folder and prepare the captions again"
NULL = ""  # the null caption's text


@dataclass(frozen=True)
class CaptionJob:
    """Which captions become states, and how.

    annotations: the captions and their pictures.
    encoder: what encodes.
    batch: captions of a forward pass.
    shard: captions in a shard.
    cut: whether captions that are longer than the context are cut, as U-ViT's code does.
    """

    annotations: Annotations
    encoder: TextEncoder
    batch: int = 64
    shard: int = 4096
    cut: bool = False

    def plan(self) -> dict[str, Any]:
        """Return everything that decides the files' bits."""
        annotations, encoder = self.annotations, self.encoder
        return {
            "num_captions": len(annotations.captions),
            "num_images": len(annotations.images),
            "trained": annotations.trained,
            "index_sha256": annotations.sha256,
            "shape": [encoder.tokens, encoder.dim],
            "dtype": "float16",
            "states": "last hidden states after the final norm, of all tokens",
            "null": "states of the empty text",
            "shard": self.shard,
            "long": {"rule": "cut" if self.cut else "refuse"},
            "encoder": encoder.identity,
            "precision": "fp32",
            "device": encoder.device.type,
            "batch": self.batch,
            "versions": {"torch": str(torch.__version__)},
        }


def encode_captions(
    job: CaptionJob, folder: Path, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Encode the captions of every shard that is missing, and write the manifest; return it.

    Raises:
        ValueError: A caption is longer than the context, or the folder is being filled with
            something else or lacks space.
    """
    texts = [*job.annotations.captions, NULL]
    long = _check_lengths(job, texts[:-1])
    agree_on_plan(job.plan(), folder)
    num_shards = math.ceil(len(texts) / job.shard)
    require_space(folder, len(texts) * job.encoder.tokens * job.encoder.dim * 2, "--out")

    # A stopped run goes on with the first shard that has no .json.
    for number in range(num_shards):
        start = number * job.shard
        rows = texts[start : start + job.shard]
        path = shard_path(folder, number)
        if not path.with_suffix(".json").exists():
            states = job.encoder.states(rows, job.batch).half()
            if not bool(states.isfinite().all()):
                raise ValueError(
                    "the text encoder makes states that float16 cannot hold; name another encoder"
                )
            with written_whole(path) as file:
                np.save(file, states.numpy())
            write_json(path.with_suffix(".json"), {"num": len(rows), "sha256": file_sha256(path)})
        report(min(start + job.shard, len(texts)), len(texts))
    return _finish(job, folder, num_shards, long)


def _check_lengths(job: CaptionJob, texts: list[str]) -> int:
    """Return how many captions are longer than the context; ValueError unless they are cut."""
    lengths = [job.encoder.length(text) for text in texts]
    long = [place for place, length in enumerate(lengths) if length > job.encoder.tokens]
    if long and not job.cut:
        first = long[0]
        raise ValueError(
            f"{len(long)} of {len(texts)} captions are longer than the context of "
            f"{job.encoder.tokens} tokens, such as {texts[first][:60]!r} with {lengths[first]}; "
            "shorten them, or cut them with --long cut, as U-ViT's code does"
        )
    return len(long)


def _finish(job: CaptionJob, folder: Path, num_shards: int, long: int) -> dict[str, Any]:
    """Write the index of the captions, then the manifest."""
    annotations = job.annotations
    starts = np.cumsum([0, *map(len, annotations.texts)], dtype=np.int64)
    for name, lines in ((IMAGES, annotations.images), (TEXTS, annotations.captions)):
        with written_whole(folder / name) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    with written_whole(folder / STARTS) as file:
        np.save(file, starts)

    # Files of captions or states that were made otherwise have another hash.
    shards = [
        read_json(shard_path(folder, number).with_suffix(".json"), REPEAT)
        for number in range(num_shards)
    ]
    digests = "".join(shard["sha256"] for shard in shards)
    manifest = job.plan() | {
        "shards": [shard["num"] for shard in shards],
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    manifest["long"]["number"] = long
    write_json(folder / MANIFEST, manifest)
    return manifest


def describe_states(manifest: dict[str, Any], data: Data) -> str:
    """Say what was made, and whether the protocols on MS-COCO read it."""
    tokens, dim = manifest["shape"]
    encoder = manifest["encoder"]["name"]
    text = (
        f"{manifest['num_captions']} captions in {len(manifest['shards'])} shards, {tokens} tokens "
        f"of width {dim} by {encoder}; {manifest['long']['number']} cut"
    )
    if encoder != data.captions:
        text += (
            f"\nwarning: the protocols take states of {data.captions}; a run on these declares "
            f"Data(captions={encoder!r})"
        )
    return text


class MappedStates:
    """States of captions in memory-mapped shards.

    shape: (M + 1, L, K).
    sha256: of the shards.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder's shards; ValueError if one is missing, damaged or of another shape."""
        manifest = read_captions_manifest(folder)
        tokens, dim = manifest["shape"]
        self.starts = np.cumsum([0, *manifest["shards"]])
        self.shape = (int(self.starts[-1]), int(tokens), int(dim))
        self.sha256: str = manifest["sha256"]
        self.shards = []
        for number, (start, end) in enumerate(pairwise(self.starts)):
            path = shard_path(folder, number)
            # As a plain array, because slices of a memmap are slow.
            rows = np.asarray(open_array(path, REPEAT))
            if rows.shape != (end - start, tokens, dim) or rows.dtype != np.float16:
                raise ValueError(
                    f"{path} holds {rows.dtype} {rows.shape} where float16 "
                    f"{(int(end - start), tokens, dim)} belongs; {REPEAT}"
                )
            self.shards.append(rows)

    @kernels.outside_graphs
    def take(self, y: Tensor) -> Tensor:
        """Read the states of captions (N,), float16 (N, L, K), onto their device.

        Raises:
            ValueError: A CUDA graph is being captured, which can read no file.
        """
        if y.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("states on disk cannot be read in a CUDA graph; leave out --graphs")
        indices = y.cpu().numpy()
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self.shape[1:]), np.float16)
        for row, number, place in zip(rows, numbers, indices - self.starts[numbers], strict=True):
            row[:] = self.shards[number][place]
        return torch.from_numpy(rows).to(y.device)


def stored_table(folder: Path) -> backbones.CaptionTable:
    """Return the table of a folder of states, which stay on disk."""
    encoder = read_captions_manifest(folder)["encoder"]["name"]
    return backbones.CaptionTable(MappedStates(folder), encoder=encoder)
