"""What a probe command probes: trained rows, a published checkpoint or a diffusers model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.probes.declared import DiffusersLocality, Locality, Probe, declared, of_training
from analysis.query import TRAINED, trained_row, trained_rows
from experiments.ablation import train_command
from experiments.engine.machine.system_errors import require_file
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Table
from experiments.engine.specs.spec import Backbone, Diffusion, Train
from experiments.engine.specs.stages import Protocol


@dataclass(frozen=True)
class Overrides:
    """Fields of a probe that the command line changes; None keeps the probe's own value."""

    images: int | None = None
    steps: int | None = None
    gradients: int | None = None
    anchors: tuple[tuple[float, float], ...] | None = None

    def apply(self, spec: Probe) -> Probe:
        """Return the probe with these fields."""
        if self.steps is not None:
            spec = replace(spec, sampler=replace(spec.sampler, num_steps=self.steps))
        if self.images is not None:
            spec = replace(spec, images=self.images)
        if isinstance(spec, Locality) and self.gradients is not None:
            spec = replace(spec, gradient_queries=self.gradients)
        if isinstance(spec, Locality) and self.anchors is not None:
            spec = replace(spec, anchors=self.anchors)
        return spec


@dataclass(frozen=True)
class Target:
    """One network to probe."""

    # How messages name it.
    label: str
    spec: Probe | DiffusersLocality


@dataclass(frozen=True)
class Request:
    """A probe and the protocol that gives its networks their inputs."""

    # One of PROBES.
    probe: str
    protocol: Protocol
    overrides: Overrides


def row_targets(
    request: Request, table: Table, labels: list[str] | None, seed: int, store: Store
) -> list[Target]:
    """Return the probes of a table's rows, all with a network unless labels are given.

    Raises:
        ValueError: if a row has not been trained in this store.
    """
    labels = labels or [row.label for row in table.rows if row.backbone]
    specs = {
        label: declared(request.probe, trained_row(table, label), request.protocol, seed)
        for label in labels
    }

    untrained = [label for label, spec in specs.items() if not _has_checkpoint(spec, store)]
    if untrained:
        command = train_command(table, untrained, request.protocol, seed)
        raise ValueError(f"not trained here: {', '.join(untrained)}; train with: {command}")
    return [Target(label, request.overrides.apply(spec)) for label, spec in specs.items()]


def _has_checkpoint(spec: Probe, store: Store) -> bool:
    checkpoints = store.run_dir(spec.train) / "checkpoints"
    return any(checkpoints.glob("step-*.pt"))


def checkpoint_target(request: Request, checkpoint: Path, backbone: str) -> Target:
    """Return the probe of a published checkpoint.

    Raises:
        ValueError: if the file or the backbone does not exist.
    """
    import backbones

    require_file(checkpoint, "checkpoint", "give the path of a .pt or .safetensors file")
    with open(checkpoint, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()

    # The network takes the protocol's input, as far as it has options for that.
    data = request.protocol.data
    backbones.require_kind(backbone, backbones.Kind.BACKBONE)
    known = backbones.options_of(backbone)
    shape: dict[str, Any] = dict(
        input_size=data.size, in_channels=data.channels, num_classes=data.num_classes
    )
    network = Backbone(backbone, {name: shape[name] for name in shape if name in known})

    spec = Train(network, data, request.protocol.recipe, _diffusion_of(backbone))
    probe = request.overrides.apply(of_training(request.probe, spec, weights))
    return Target(checkpoint.name, probe)


def _diffusion_of(backbone: str) -> Diffusion:
    """Return the diffusion of the first row that declares a method of its own for a backbone."""
    for table in TRAINED.values():
        for row in trained_rows(table).values():
            if row.backbone and row.backbone.name == backbone and row.method:
                return row.method.diffusion
    return Diffusion()


def diffusers_target(
    folder: Path,
    conditioning: Path | None,
    grid: tuple[int, int] | None,
    overrides: Overrides,
) -> Target:
    """Return the locality probe of a diffusers model."""
    from analysis.probes import diffusers_models

    model = type(diffusers_models.load(folder)).__name__
    embeddings_digest = None
    if conditioning:
        _, embeddings_digest = diffusers_models.conditioning_from(conditioning)
    fields: dict[str, Any] = dict(
        grid=grid,
        images=overrides.images,
        steps=overrides.steps,
        gradient_queries=overrides.gradients,
        anchors=overrides.anchors,
    )
    changed = {name: value for name, value in fields.items() if value is not None}
    weights = diffusers_models.digest(folder)
    return Target(folder.name, DiffusersLocality(model, weights, embeddings_digest, **changed))
