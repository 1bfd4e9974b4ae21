"""Sets of generated images on disk: chunks, which a stopped run goes on from, and files of them.

A chunk holds the images of CHUNK consecutive indices, uint8 (n, H, W, 3). So a set depends neither
on the number of processes nor, on a CPU with as many threads, on the requested batch. On a GPU
another batch may change the last bit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import nn

from experiments.engine.autoregressive.scales import ScaleSystem
from experiments.engine.data.image_files import MADE, write_images
from experiments.engine.data.quantise import to_uint8
from experiments.engine.numerics.weights import digest
from experiments.engine.records.files import read_json, require_space, written_whole
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import compute_pieces, count_missing
from experiments.engine.runtime.progress import Progress
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.forecast import announce_sampling
from experiments.engine.sampling.generate import (
    can_capture_steps,
    generate_images,
    labels_of,
)
from experiments.engine.sampling.networks import (
    Decoder,
    load_decoder,
    load_networks,
)
from experiments.engine.sampling.networks import decoder_of as decoder_of
from experiments.engine.sampling.networks import decoder_warnings as decoder_warnings
from experiments.engine.sampling.targets import SET
from experiments.engine.specs.latent_space import space_of
from experiments.engine.specs.spec import Evaluate, canonical, is_latent, spec_id

CHUNK = 250  # images in a file
BATCH = 64  # images in memory while a set is read
BATCH_ON_CPU = 25  # fixed, because convolutions on a CPU round by the size of the batch
QUANTISER = "trunc(clamp(127.5 x + 128, 0, 255))"
ORDER = "shuffled by numpy's default_rng(0)"
COUNTS = "counts"  # folder of how many evaluations each chunk took
ORIGIN = "made.json"  # what the images in a folder were made with


@dataclass(frozen=True)
class ImageSource:
    """What a set's images are made with.

    network: the network or system.
    decoder: turns its samples into images.
    origin: everything that identifies both, as the set's folder and its files keep it.
    """

    network: nn.Module
    decoder: Decoder
    origin: dict[str, Any]


class SampleSet:
    """A finished set of images, in the order in which it is scored and packed.

    That order is shuffled with a fixed seed, so that any part of the set holds all classes.

    spec: what was sampled.
    nfe: evaluations of the network per image.
    origin: what the images were made with.
    index: each image's place in the order of generation, (N,).
    labels: each image's label, (N,).
    """

    def __init__(self, spec: Evaluate, folder: Path, nfe: float) -> None:
        self.spec = spec
        self.nfe = nfe
        self.origin = _read_origin(folder / ORIGIN)
        self.index = np.random.default_rng(0).permutation(spec.num)
        self.labels = labels_of(spec).numpy()[self.index]
        self._chunks = [
            np.load(path, mmap_mode="r", allow_pickle=False)
            for path in _chunk_paths(folder, spec.num)
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (N, H, W, 3) of all images together."""
        return (self.spec.num, *self._chunks[0].shape[1:])

    def __len__(self) -> int:
        return self.spec.num

    def read(self, start: int, stop: int) -> ndarray:
        """Read the images from `start` to before `stop`, uint8 (n, H, W, 3)."""
        return np.stack([self._chunks[i // CHUNK][i % CHUNK] for i in self.index[start:stop]])

    def batches(self, size: int = BATCH) -> Iterator[ndarray]:
        """Read all images, uint8 (n, H, W, 3), `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def pack(self, path: Path) -> None:
        """Write one .npz file that ADM's evaluator reads, with labels, indices and origin."""
        write_images(path, self.batches(), self.shape, self.labels, self.index, self._about())

    def _about(self) -> dict[str, Any]:
        """Return what the files say of the set."""
        return describe_set(self.spec, self.origin) | {"nfe": self.nfe}

    def write_png(self, folder: Path) -> None:
        """Write one PNG for each image, named by index and label: 000012-207.png.

        Each bears the id of its set, by which a later command knows it, and how it was made.
        """
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        origin = PngInfo()
        origin.add_text(SET, set_id(self.spec, self.origin))
        origin.add_text(MADE, json.dumps(self._about(), sort_keys=True))
        places = iter(zip(self.index, self.labels, strict=True))
        for batch in self.batches():
            for image in batch:
                index, label = next(places)
                with written_whole(folder / _png_name(index, label)) as file:
                    Image.fromarray(image).save(file, "PNG", pnginfo=origin)


def describe_set(spec: Evaluate, origin: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of its set before a single image is drawn."""
    return origin | {
        "data": spec.data.name,
        "labels": spec.labels,
        "order": ORDER,
        "seed": spec.seed,
        "precision": spec.precision,
    }


def set_id(spec: Evaluate, origin: dict[str, Any]) -> str:
    """Return the id of a set: that of its spec, and the digest of the weights that draw it."""
    return f"{spec_id(spec)}-{origin['network']}"


def image_bytes(spec: Evaluate) -> int:
    """Return the size of one image, before any compression."""
    data = spec.data
    side = space_of(data).factor * data.size if is_latent(data) else data.size
    return 3 * side**2


def png_names(spec: Evaluate) -> set[str]:
    """Return the names of a set's PNGs."""
    return {_png_name(index, label) for index, label in enumerate(labels_of(spec).tolist())}


def _png_name(index: int, label: int) -> str:
    return f"{index:06d}-{label}.png"


def read_png_name(name: str) -> tuple[int, int] | None:
    """Return index and label that the name of a set's PNG holds; None for another file."""
    match = re.fullmatch(r"([0-9]{6,})-([0-9]+)\.png", name)
    return (int(match[1]), int(match[2])) if match else None


def generate_samples(
    spec: Evaluate,
    context: RunContext,
    check: Callable[[dict[str, Any]], None] = lambda origin: None,
) -> SampleSet:
    """Return the sample set of a spec, generating what is missing of it.

    The Evaluate stage scores this set and sample.py packs it. It lies under the spec's own id,
    beside the folder of the network's run.

    Args:
        spec: what is sampled.
        context: where the folder, the device and the ranks are.
        check: raises ValueError on the first rank, before an image is drawn, for an origin whose
            set has no place to go.
    """
    network, key, warnings = load_networks(spec, context)
    decoder = load_decoder(spec.data, context.device)
    origin = {
        "network": digest(network),
        "key": key,
        "sampler": canonical(spec.sampler, full=True),
        "decoder": decoder.identity,
        "quantiser": QUANTISER,
    }
    if isinstance(network, ScaleSystem):
        origin["tokenizer"] = network.identity
    if warnings:
        origin["warnings"] = list(warnings)
    if context.group.first:
        check(origin)
    folder = context.folder_of(spec) / "samples"
    return fill_sample_folder(spec, folder, ImageSource(network, decoder, origin), context)


def fill_sample_folder(
    spec: Evaluate, folder: Path, source: ImageSource, context: RunContext
) -> SampleSet:
    """Generate the chunks that a folder lacks, each rank its share; return the set on every rank.

    The context's report hears of each chunk of this rank.

    Raises:
        ValueError: the folder's images were made with something else.
    """
    _keep_origin(folder, source.origin, context.group.first)
    if context.group.first:
        missing = [path for path in _chunk_paths(folder, spec.num) if not path.exists()]
        require_space(folder, min(spec.num, len(missing) * CHUNK) * image_bytes(spec), "--results")
    writer = _ChunkWriter(spec, folder, source, context)
    counts = compute_pieces(context, folder / COUNTS, len(writer.paths), writer.write)
    evaluated = sum(int(arrays["evaluated"]) for arrays in counts)
    writer.model.release_graphs()
    return SampleSet(spec, folder, context.group.broadcast(evaluated) / spec.num)


def _keep_origin(folder: Path, origin: dict[str, Any], first: bool) -> None:
    """Write what the images are made with, or compare it with what is there."""
    path = folder / ORIGIN
    if path.exists():
        there = _read_origin(path)
        keys = sorted(there.keys() | origin.keys())
        changed = [key for key in keys if there.get(key) != origin.get(key)]
        if changed:
            raise ValueError(
                f"the images in runs/{folder.parent.name}/{folder.name} were made with another "
                f"{', '.join(changed)}; remove that folder to draw them anew"
            )
    elif first:
        with written_whole(path) as file:
            file.write(json.dumps(origin, indent=1, sort_keys=True).encode())


def _read_origin(path: Path) -> dict[str, Any]:
    """Read what images were made with; ValueError that names the file if it is damaged."""
    advice = f"remove the folder {path.parent} to draw the images anew"
    there = read_json(path, advice)
    if not isinstance(there, dict):
        raise ValueError(f"{path}: no JSON object; {advice}")
    return there


class _ChunkWriter:
    """Generates chunks of a set and writes them, and reports how fast."""

    def __init__(
        self, spec: Evaluate, folder: Path, source: ImageSource, context: RunContext
    ) -> None:
        self.spec = spec
        self.context = context
        self.decode = source.decoder.decode
        self.paths = _chunk_paths(folder, spec.num)
        self.batch = sampling_batch(context.device, context.resources.sample_batch)
        capture_steps = context.resources.graphs and can_capture_steps(spec)
        self.model = CountingModel(source.network, capture_steps)
        left = min(spec.num, count_missing(folder / COUNTS, len(self.paths)) * CHUNK)
        announce_sampling(
            spec, source.network, left, min(self.batch, CHUNK), context.device, context.group
        )
        self.started = time.perf_counter()
        self.num_written = 0  # images

    def write(self, number: int) -> dict[str, ndarray]:
        """Generate and write one chunk; return how many evaluations it took."""
        evaluated = self.model.evaluated
        within = range(number * CHUNK, min((number + 1) * CHUNK, self.spec.num))
        device = self.context.device
        generated = generate_images(self.spec, self.model, device, self.batch, within)
        levels = torch.cat([to_uint8(self.decode(x)) for x, _ in generated])

        # One channel is written as three equal ones: (n, C, H, W) -> (n, H, W, 3).
        pixels = levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
        with written_whole(self.paths[number]) as file:
            np.save(file, pixels, allow_pickle=False)

        self.num_written += len(within)
        rate = self.num_written / (time.perf_counter() - self.started)
        self.context.report(Progress(within.stop, self.spec.num, rate))
        return {"evaluated": np.array(self.model.evaluated - evaluated)}


def sampling_batch(device: torch.device, requested: int) -> int:
    """Number of images that a device samples at a time."""
    return BATCH_ON_CPU if device.type == "cpu" else requested


def _chunk_paths(folder: Path, num: int) -> list[Path]:
    return [folder / f"{start:08d}.npy" for start in range(0, num, CHUNK)]
