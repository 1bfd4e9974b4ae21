"""Generated images on disk: chunks that a stopped run goes on from, and the files made of them.

A chunk holds the images of CHUNK consecutive indices, uint8 (n, H, W, 3), so a set does not depend on who drew it, nor on a CPU, with
as many threads, on the batch that was asked; on a GPU another batch may change the last bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

import backbones
from experiments.engine.data import image_files as npz
from experiments.engine.data.locate import folder_of, has_manifest, read_manifest, vae_source
from experiments.engine.data.quantise import to_uint8
from experiments.engine.diffusion.cascade import System
from experiments.engine.numerics.cuda_graphs import accelerate, require_gpu
from experiments.engine.numerics.weights import digest
from experiments.engine.records.files import written_whole
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.pieces import compute_pieces
from experiments.engine.runtime.progress import Progress
from experiments.engine.sampling.generate import (
    CountingModel,
    can_capture_steps,
    generate_images,
    image_labels,
)
from experiments.engine.specs.spec import Checkpoint, Data, Evaluate, canonical, is_latent, spec_id
from experiments.engine.training.trainer import build, load_ema

CHUNK = 250
ON_CPU = 25  # images at a time whatever is asked: convolutions there round by the batch
QUANTISER = "trunc(clamp(127.5 x + 128, 0, 255))"
ORDER = "shuffled by numpy's default_rng(0)"


class SampleSet:
    """The finished set of a spec, in the order in which it is scored and packed: shuffled with a fixed seed.

    `labels` and `index` (N,) are in that order; index is each image's place in the order of generation; `nfe` is how often
    the network was evaluated for an image.
    """

    def __init__(self, spec: Evaluate, folder: Path, nfe: float) -> None:
        self.spec, self.nfe, self.made = spec, nfe, json.loads((folder / "made.json").read_text())
        self.index = np.random.default_rng(0).permutation(spec.num)
        self.labels = image_labels(spec.labels, spec.num, spec.data.num_classes, spec.seed).numpy()[
            self.index
        ]
        self._chunks = [
            np.load(path, mmap_mode="r", allow_pickle=False)
            for path in _chunk_paths(folder, spec.num)
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.spec.num, *self._chunks[0].shape[1:])

    def __len__(self) -> int:
        return self.spec.num

    def part(self, start: int, stop: int) -> ndarray:
        """uint8 (stop - start, H, W, 3)."""
        return np.stack([self._chunks[i // CHUNK][i % CHUNK] for i in self.index[start:stop]])

    def batches(self, size: int = 64) -> Iterator[ndarray]:
        """uint8 (n, H, W, 3), `size` at a time."""
        for start in range(0, len(self), size):
            yield self.part(start, min(start + size, len(self)))

    def pack(self, path: Path) -> None:
        """One ADM-readable .npz with the labels (arr_1), indices and origin beside the images."""
        spec = self.spec
        said = {
            "data": spec.data.name,
            "labels": spec.labels,
            "order": ORDER,
            "seed": spec.seed,
            "precision": spec.precision,
            "nfe": self.nfe,
        }
        npz.write_images(
            path, self.batches(), self.shape, self.labels, self.index, self.made | said
        )

    def write_png(self, folder: Path) -> None:
        """One PNG an image, by index and label: 000012-207.png."""
        from PIL import Image

        for start, batch in zip(range(0, self.spec.num, 64), self.batches(), strict=True):
            for i, y, image in zip(
                self.index[start : start + 64], self.labels[start : start + 64], batch, strict=True
            ):
                with written_whole(folder / f"{i:06d}-{y}.png") as file:
                    Image.fromarray(image).save(file, "PNG")


def fill_sample_folder(
    spec: Evaluate,
    folder: Path,
    model: nn.Module,
    decode: Callable[[Tensor], Tensor],
    made: dict[str, Any],
    context: RunContext,
) -> SampleSet:
    """Draw the chunks that are missing, each rank its share, and return the set on every rank.

    The context's report hears of each chunk of this rank.
    decode: samples (n, C, H, W) to images (n, 1 or 3, H', W') in [-1, 1]; one channel is written as three equal ones.
    made: what identifies the network and the decoder; ValueError if the folder's images were made otherwise.
    """
    origin = folder / "made.json"
    if origin.exists():
        if (found := json.loads(origin.read_text())) != made:
            changed = ", ".join(
                sorted(key for key in found.keys() | made.keys() if found.get(key) != made.get(key))
            )
            raise ValueError(
                f"the images in runs/{folder.parent.name}/{folder.name} were made with another {changed}; remove that folder to draw them anew"
            )
    elif context.group.first:
        with written_whole(origin) as file:
            file.write(json.dumps(made, indent=1, sort_keys=True).encode())
    device = context.device
    batch = sampling_batch(device, context.resources.sample_batch)
    recorded = context.resources.graphs and can_capture_steps(spec)
    started, paths, drawn, counted = (
        time.perf_counter(),
        _chunk_paths(folder, spec.num),
        [0],
        CountingModel(model, recorded),
    )

    def chunk(piece: int) -> dict[str, ndarray]:
        before = counted.evaluated
        within = range(piece * CHUNK, min((piece + 1) * CHUNK, spec.num))
        levels = torch.cat(
            [to_uint8(decode(x)) for x, _ in generate_images(spec, counted, device, batch, within)]
        )
        with written_whole(paths[piece]) as file:  # (n, H, W, 3)
            np.save(
                file,
                levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy(),
                allow_pickle=False,
            )
        drawn[0] += len(within)
        rate = drawn[0] / (time.perf_counter() - started)
        context.report(Progress(within.stop, spec.num, rate))
        return {"evaluated": np.array(counted.evaluated - before)}

    evaluated = sum(
        int(found["evaluated"])
        for found in compute_pieces(context, folder / "counts", len(paths), chunk)
    )
    counted.forget()
    return SampleSet(spec, folder, context.group.broadcast(evaluated) / spec.num)


def generate_samples(spec: Evaluate, context: RunContext) -> SampleSet:
    """The set of a spec, drawn as far as it is missing: what the Evaluate stage scores and sample.py packs.

    The images lie under the spec's own id, beside the folder of the network's run.
    """
    model, key = load_networks(spec, context.folder, context.resources)
    decode, decoder = load_decoder(spec.data, context.device)
    made = {
        "network": digest(model),
        "key": key,
        "sampler": canonical(spec.sampler, full=True),
        "decoder": decoder,
        "quantiser": QUANTISER,
    }
    return fill_sample_folder(
        spec, context.folder_of(spec) / "samples", model, decode, made, context
    )


def load_networks(spec: Evaluate, folder: Path, resources: Resources) -> tuple[nn.Module, str]:
    """The finished run's EMA network, or all networks of a system, or the published one whose file is given; in eval mode.

    With the key under which its weights lay: a spec with the default one takes them from where published files usually have them.
    """
    device, source = torch.device(resources.device), spec.train
    if resources.graphs:
        require_gpu(device)
    if not isinstance(source, Checkpoint):
        base = accelerate(load_ema(source, folder, device), resources.compile)
        parts = [
            stage and load_ema(stage, folder.parent / spec_id(stage), device)
            for stage in (spec.classifier, spec.upsampler)
        ]
        return (System(base, *parts).eval() if any(parts) else base), "ema"
    assert resources.checkpoint is not None, "a published checkpoint needs its file"
    model = build(source.backbone, 0, device)
    key = backbones.load_published(
        model, resources.checkpoint, None if source.key == Checkpoint.key else source.key
    )
    return accelerate(model.eval(), resources.compile), key


def load_decoder(
    data: Data, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """From samples to images in [-1, 1], and what identifies it: nothing for pixels, the VAE for latents.

    ValueError for another VAE than made the latents: the one that the set declares, and that its manifest names where that is here.
    """
    if not is_latent(data):
        return lambda x: x, {"name": "none: pixels"}
    from experiments.engine.data.autoencoder import SCALE, load_autoencoder

    vae, folder = load_autoencoder(vae_source(), device), folder_of(data)
    made_by = read_manifest(folder, data)["vae"]["encoder"] if has_manifest(data) else data.vae
    if made_by not in ("sd-vae-ft", vae.encoder):
        raise ValueError(
            f"set {folder.name} holds latents of another VAE (encoder {made_by}) than $DICO_VAE names ({vae.name}, encoder {vae.encoder})"
        )
    return vae.decode, {"name": vae.name, "sha256": vae.weights, "scale": SCALE, "dtype": "fp32"}


def decoder_warnings(data: Data, decoder: dict[str, Any]) -> list[str]:
    """A line where neither the VAE's name, nor the set's declaration, nor a manifest of its latents says that they belong together."""
    if not is_latent(data) or data.vae != "sd-vae-ft" or has_manifest(data):
        return []
    from experiments.engine.data.autoencoder import PUBLISHED

    if decoder["name"] in PUBLISHED:
        return []
    named = f"the VAE {decoder['name']} (SHA-256 {decoder['sha256']})"
    return [
        f"decoded with {named}, which is not known to be {' or '.join(PUBLISHED)}: there are no latents of {data.name} here to hold it against"
    ]


def sampling_batch(device: torch.device, asked: int) -> int:
    """Images at a time that a device draws."""
    return ON_CPU if device.type == "cpu" else asked


def _chunk_paths(folder: Path, num: int) -> list[Path]:
    return [folder / f"{start:08d}.npy" for start in range(0, num, CHUNK)]
