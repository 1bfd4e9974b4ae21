"""Load the network that a probe names, walk it from noise to images, and keep what the probe found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from analysis.probes import channels, diffusers_models, locality
from analysis.probes.declared import Channels, DiffusersLocality, Features, Locality, Probe, keep
from analysis.probes.layers import layers
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.numerics.weights import digest
from experiments.engine.records.store import Record, Store, provenance
from experiments.engine.sampling import generate
from experiments.engine.specs.spec import Evaluate
from experiments.engine.training.trainer import build, load_ema


@dataclass(frozen=True)
class Files:
    """What a probe of other weights than a run's reads: a published checkpoint, or a diffusers folder and its text embeddings."""

    checkpoint: Path | None = None
    diffusers: Path | None = None
    conditioning: Path | None = None


def network(
    spec: Probe | DiffusersLocality, store: Store, files: Files, device: torch.device
) -> nn.Module:
    """The finished run's EMA network or, where the probe names weights, the network in `files`."""
    if isinstance(spec, DiffusersLocality):
        text = (
            diffusers_models.conditioning_from(files.conditioning)[0]
            if files.conditioning
            else None
        )
        return diffusers_models.Adapted(diffusers_models.load(files.diffusers), text, spec.grid).to(
            device
        )
    if spec.weights is None:
        return load_ema(spec.train, store.run_dir(spec.train), device)
    assert files.checkpoint is not None, spec
    model = build(spec.train.backbone, seed=0, device=device)
    backbones.load_published(model, files.checkpoint)
    return model.eval()


def walk(spec: Probe, device: torch.device) -> Callable[[Any], None]:
    """Sample with a network (x, t, y) -> prediction: all images in one batch, as `images` of the trained run's evaluation are."""
    sampling = Evaluate(spec.train, spec.sampler, spec.images, features="", labels="balanced")

    def run(model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        for images, _ in generate.generate_images(sampling, model, device, spec.images):
            if not images.isfinite().all():
                raise ValueError(
                    "the samples are not finite; the network's weights have diverged or are of another network"
                )

    return run


def run(
    spec: Probe | DiffusersLocality, model: nn.Module, device: torch.device, memory: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The probe's arrays and scalars. ValueError where the network has not what is probed, or a figure is not finite."""
    with precision("fp32", device):
        if isinstance(spec, DiffusersLocality):
            return locality.probe(
                model, model.layers(), settings(spec, memory), diffusers_models.walk(model, spec)
            )
        way = walk(spec, device)
        if isinstance(spec, Locality):
            return locality.probe(model, layers(model), settings(spec, memory), way)
        if isinstance(spec, Channels):
            return channels.record(model, channels.last_mixer(model), way, keep_maps=False)
        assert isinstance(spec, Features), spec
        return channels.record(model, channels.first_stage(model), way, keep_maps=True)


def settings(spec: Locality | DiffusersLocality, memory: int) -> locality.Settings:
    return locality.Settings(
        spec.queries,
        spec.anchors,
        spec.gradient_queries,
        spec.gradient_images,
        spec.directions,
        memory,
    )


def execute(
    spec: Probe | DiffusersLocality, store: Store, files: Files, device: torch.device, memory: int
) -> Record:
    """Probe and record; a failure is raised and leaves nothing behind."""
    started = time.perf_counter()
    model = network(spec, store, files, device)
    arrays, values = run(spec, model, device, memory)
    with precision("fp32", device):
        in_force = read_tf32_flags()
    about = provenance() | {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision_flags": in_force,
        "weights_sha256": digest(model),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return keep(store, spec, arrays, values, about)
