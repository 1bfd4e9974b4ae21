"""What a probe is asked, as specs with records like any stage's, and the arrays it leaves. No torch here.

The arrays lie beside the record, in a file that is named by its checksum.
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
    """A network on its own way from noise to `images` samples: EMA weights of a run or, if given, those of a file.

    `weights` is the SHA-256 of a published checkpoint. Labels are balanced over the classes.
    """

    train: Train
    sampler: Sampler = WALK
    images: int = 20
    weights: str | None = None


@dataclass(frozen=True)
class Locality(Probe):
    """Where every layer and head looks, from `queries` tokens of each grid (all, if there are fewer).

    `anchors` are (row, column) fractions of a grid whose tokens' maps are kept. Jacobians are taken at `gradient_queries`
    tokens (0: none) of the first `gradient_images`, each estimated from `directions` random directions of the output.
    """

    queries: int = 256
    anchors: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.0, 0.0))
    gradient_queries: int = 64
    gradient_images: int = 2
    directions: int = 4


@dataclass(frozen=True)
class DiffusersLocality:
    """As Locality, of a diffusers transformer: its class, its weights' SHA-256 and that of the text embeddings (None: zeros)."""

    model: str
    weights: str
    conditioning: str | None = None
    grid: tuple[int, int] | None = None
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
    """What the first stage puts out: maps of the first image, redundancy over all."""


PROBES: dict[str, type[Probe]] = {"locality": Locality, "channels": Channels, "features": Features}


def declared(probe: str, row: Row, protocol: Protocol, seed: int) -> Probe:
    return of_training(probe, train_stage(row, protocol, seed))


def of_training(probe: str, train: Train, weights: str | None = None) -> Probe:
    """The probe of a run's network, or of a file's, on the deterministic way of its kind: DDIM, or Euler steps of a flow."""
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
    np.savez_compressed(packed, **arrays)
    name = f"{hashlib.sha256(packed.getvalue()).hexdigest()[:16]}.npz"
    with written_whole(store.here.folder / kind_of(spec) / name) as file:
        file.write(packed.getvalue())
    return store.append(spec, "done", values | {"arrays": name}, provenance)


def arrays_of(
    store: Store, record: Record, source: RecordFolder | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a record; ValueError if their file is gone or is not what the record names."""
    import numpy as np

    folder = (source or store.here).folder
    path = folder / record.kind / record.values["arrays"]
    if not path.is_file():
        raise ValueError(
            f"{record.kind} {record.id}: {path.name} is missing beside its record; probe again with --again"
        )
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest()[:16] != path.stem:
        raise ValueError(
            f"{record.kind} {record.id}: {path.name} is damaged; probe again with --again"
        )
    with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
