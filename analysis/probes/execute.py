"""Load the network that a probe names, take it from noise to images, and record the measures."""

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
from analysis.probes.captioned import tokens
from analysis.probes.declared import (
    Channels,
    DiffusersLocality,
    Features,
    Locality,
    Probe,
    Tokens,
    keep,
)
from analysis.probes.layers import layers
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.numerics.weights import digest
from experiments.engine.records.store import Record, Store, provenance
from experiments.engine.sampling import generate
from experiments.engine.specs.spec import Evaluate
from experiments.engine.training.networks import build, load_ema


@dataclass(frozen=True)
class Files:
    """What a probe reads if its weights are not those of a run."""

    # A published checkpoint.
    checkpoint: Path | None = None
    # A folder of a diffusers model or pipeline.
    diffusers: Path | None = None
    # Text embeddings for the diffusers model.
    conditioning: Path | None = None


@dataclass(frozen=True)
class Machine:
    """Where a probe runs."""

    device: torch.device
    # What a chunk of weights may take, in MiB.
    memory: int


def execute(
    spec: Probe | DiffusersLocality, store: Store, files: Files, machine: Machine
) -> Record:
    """Probe a network and record it. A failure is raised and leaves nothing behind."""
    started = time.perf_counter()
    warnings: list[str] = []
    model = load_network(spec, store, files, machine.device, warnings)
    arrays, values = measure(spec, model, machine)
    for text in warnings:
        backbones.print_warning(text)

    # The flags are read back, not assumed, in the mode of the measurement.
    with precision("fp32", machine.device):
        flags_in_force = read_tf32_flags()
    about = provenance() | {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if machine.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision_flags": flags_in_force,
        "weights_sha256": digest(model),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if warnings:
        about["warnings"] = warnings

    return keep(store, spec, arrays, values, about)


def load_network(
    spec: Probe | DiffusersLocality,
    store: Store,
    files: Files,
    device: torch.device,
    warnings: list[str],
) -> nn.Module:
    """Return a run's EMA network or, if the probe names weights, the network in `files`.

    What a record must say of the weights is added to `warnings`.
    """
    if isinstance(spec, DiffusersLocality):
        assert files.diffusers is not None, spec
        embeddings = None
        if files.conditioning:
            embeddings, _ = diffusers_models.conditioning_from(files.conditioning)
        transformer = diffusers_models.load(files.diffusers)
        return diffusers_models.adapt(transformer, embeddings, spec.grid).to(device)

    if spec.weights is None:
        return load_ema(spec.train, store.run_dir(spec.train), device, warnings.append)

    assert files.checkpoint is not None, spec
    model = build(spec.train.backbone, seed=0, device=device)
    backbones.load_published(model, files.checkpoint, warn=warnings.append)
    return model.eval()


def measure(
    spec: Probe | DiffusersLocality, model: nn.Module, machine: Machine
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the probe's arrays and scalars.

    Raises:
        ValueError: if the network lacks what is probed, or a figure is not finite.
    """
    with precision("fp32", machine.device):
        if isinstance(spec, DiffusersLocality):
            assert isinstance(model, diffusers_models.Adapted), spec
            settings = settings_of(spec, machine.memory)
            walk = diffusers_models.walk(model, spec)
            return locality.probe(model, model.layers(), settings, walk)

        walk = walk_of(spec, machine.device)
        if isinstance(spec, Locality):
            return locality.probe(model, layers(model), settings_of(spec, machine.memory), walk)
        if isinstance(spec, Channels):
            return channels.record(model, channels.last_mixer(model), walk, keep_maps=False)
        if isinstance(spec, Tokens):
            return tokens.probe(model, spec, walk)
        assert isinstance(spec, Features), spec
        return channels.record(model, channels.first_stage(model), walk, keep_maps=True)


def walk_of(spec: Probe, device: torch.device) -> Callable[[Any], None]:
    """Return a function that samples with a network (x, t, y) -> prediction.

    All images are one batch. They are those with which an evaluation of the trained run begins.
    """
    sampling = Evaluate(spec.train, spec.sampler, spec.images, features="", labels="balanced")

    def walk(model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        for images, _ in generate.generate_images(sampling, model, device, spec.images):
            if not images.isfinite().all():
                raise ValueError(
                    "the samples are not finite; "
                    "the network's weights have diverged or are of another network"
                )

    return walk


def settings_of(spec: Locality | DiffusersLocality, memory: int) -> locality.Settings:
    """Return the settings of a locality probe that may take `memory` MiB for a chunk of weights."""
    return locality.Settings(
        spec.queries,
        spec.anchors,
        spec.gradient_queries,
        spec.gradient_images,
        spec.directions,
        memory,
    )
