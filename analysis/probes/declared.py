"""The specs of probes, with records like those of any stage, and the arrays that probes write.

The arrays lie beside the record, in a file that is named by its checksum. This module needs no
torch.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.engine.records.files import written_whole
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Sampler, Train, kind_of
from experiments.engine.specs.stages import Protocol, train_stage

if TYPE_CHECKING:
    import numpy as np

WALK = Sampler("ddim", num_steps=10, channels=None)


@dataclass(frozen=True)
class Probe:
    """A probe of a network on its own way from noise to samples. Labels are balanced."""

    # The training whose EMA weights are probed.
    train: Train
    # The way from noise to samples.
    sampler: Sampler = WALK
    # Samples in the batch.
    images: int = 20
    # SHA-256 of a published checkpoint, whose weights are probed instead.
    weights: str | None = None


@dataclass(frozen=True)
class Locality(Probe):
    """Where every layer and head looks."""

    # Tokens of each grid whose weights are measured; all, if there are fewer.
    queries: int = 256
    # (row, column) fractions of a grid; the maps of the tokens there are kept.
    anchors: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.0, 0.0))
    # Tokens whose Jacobians are taken; 0 for none.
    gradient_queries: int = 64
    # Images, from the first on, whose Jacobians are taken.
    gradient_images: int = 2
    # Random directions of the output from which a Jacobian is estimated.
    directions: int = 4


@dataclass(frozen=True)
class DiffusersLocality:
    """The locality of a diffusers transformer; fields as in Locality, unless described here."""

    # The transformer's class.
    model: str
    # SHA-256 of its weights.
    weights: str
    # SHA-256 of the text embeddings; None stands for zeros.
    conditioning: str | None = None
    # (rows, columns) of latents or, in Flux, of packed tokens; None: the model's own.
    grid: tuple[int, int] | None = None
    # Steps from noise to latents.
    steps: int = 10
    images: int = 2
    queries: int = 256
    anchors: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.0, 0.0))
    gradient_queries: int = 0
    gradient_images: int = 1
    directions: int = 4


@dataclass(frozen=True)
class Channels(Probe):
    """Activation and redundancy of the channels that the last layer's mixer puts out."""


@dataclass(frozen=True)
class Features(Probe):
    """Output of the first stage: maps of the first image, and redundancy over all images."""


@dataclass(frozen=True)
class Tokens(Probe):
    """From which places of the image each token of its caption is read."""

    # Images, one for each of the first captions.
    images: int = 210
    # Captions whose maps are kept: "a seven", "a seven left of a two", "a two left of a seven" and
    # "a seven above a two".
    shown: tuple[int, ...] = (7, 82, 37, 182)


PROBES: dict[str, type[Probe]] = {
    "locality": Locality,
    "channels": Channels,
    "features": Features,
    "tokens": Tokens,
}


def declared(probe: str, row: Row, protocol: Protocol, seed: int) -> Probe:
    """Return the probe of a row that is trained under a protocol."""
    return of_training(probe, train_stage(row, protocol, seed))


def of_training(probe: str, train: Train, weights: str | None = None) -> Probe:
    """Return the probe of a training, or of a published checkpoint of the same network.

    The way from noise is deterministic: DDIM, or Euler steps of a flow.
    """
    sampler = WALK if train.diffusion.name == "iddpm" else replace(WALK, name="euler")
    return PROBES[probe](train, sampler, weights=weights)


def keep(
    store: Store,
    spec: Probe | DiffusersLocality,
    arrays: dict[str, np.ndarray],
    values: dict[str, Any],
    provenance: dict[str, Any],
) -> Record:
    """Write the arrays, then the record that names them."""
    import numpy as np

    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    name = f"{_checksum(packed.getvalue())}.npz"
    with written_whole(store.here.folder / kind_of(spec) / name) as file:
        file.write(packed.getvalue())
    return store.append(spec, "done", values | {"arrays": name}, provenance)


def arrays_of(folder: RecordFolder, record: Record) -> dict[str, np.ndarray]:
    """Return the arrays of a record in a folder.

    Raises:
        ValueError: if their file is missing, or is not the one that the record names.
    """
    import numpy as np

    path = folder.folder / record.kind / record.values["arrays"]
    name = f"{record.kind} {record.id}: {path.name}"
    if not path.is_file():
        raise ValueError(f"{name} is missing beside its record; probe again with --again")
    packed = path.read_bytes()
    if _checksum(packed) != path.stem:
        raise ValueError(f"{name} is damaged; probe again with --again")
    with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def series_of(arrays: dict[str, np.ndarray], kinds: tuple[str, ...]) -> list[int]:
    """Return the numbers of the series of these kinds, in the order of the layers.

    Grids of a single token are left out.
    """
    count = sum(name.startswith("kind_") for name in arrays)
    return [
        p
        for p in range(count)
        if str(arrays[f"kind_{p}"]) in kinds and arrays[f"grid_{p}"].prod() > 1
    ]


def _checksum(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:16]
