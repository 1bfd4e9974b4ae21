"""How long a training is expected to take, from records or from the paper. No torch."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from experiments.engine.records.store import Record, Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import FACTOR, Train, is_latent
from experiments.engine.specs.stages import cost_stages, train_stage


class Estimate(NamedTuple):
    """An expected time, and where it is known from."""

    # Of one GPU, or of one process on CPUs.
    seconds: float
    # The end of a sentence: "about 3 h, by ...".
    source: str


def training_seconds(train: Train, row: Row, selection: Selection, store: Store) -> Estimate | None:
    """Estimate a whole training of a row's system."""
    estimate = _recorded_training(train, selection, store)
    if estimate is None and train == train_stage(row, selection.protocol, train.seed):
        estimate = seconds_per_image(row, selection, store)
    if estimate is None:
        return None
    images = train.recipe.steps * train.recipe.batch
    return Estimate(estimate.seconds * images, estimate.source)


def seconds_per_image(row: Row, selection: Selection, store: Store) -> Estimate | None:
    """Estimate one training image of a row.

    The row's own recorded training counts most. Then come recorded trainings of the table's other
    rows, scaled by counted Gflops. Table 6 of the paper is asked last, in the same two ways.
    """
    for source in (_recorded, _published):
        own = source(row, selection, store)
        if own:
            return own
        scaled = _scaled(row, selection, store, source)
        if scaled:
            return scaled
    return None


def matches_device(record: Record, device: str) -> bool:
    """Return whether a record is of the kind of device that is planned with: CPU or GPU."""
    return (record.provenance["device"] == "cpu") == (device == "cpu")


_Source = Callable[[Row, Selection, Store], Estimate | None]


def _scaled(row: Row, selection: Selection, store: Store, source: _Source) -> Estimate | None:
    """Estimate a row from the table's other rows, by the ratio of counted operations."""
    macs = _macs(row, selection, store)
    if not macs:
        return None

    # Every row of which both time and operations are known.
    seconds, sources, labels = [], [], []
    for other in (*selection.table.rows, *selection.table.outside):
        other_macs = _macs(other, selection, store)
        estimate = source(other, selection, store) if other_macs else None
        if other_macs and estimate:
            seconds.append(estimate.seconds * macs / other_macs)
            sources.append(estimate.source)
            labels.append(other.label)
    if not seconds:
        return None
    known = f"{', '.join(dict.fromkeys(sources))} of {', '.join(dict.fromkeys(labels))}"
    return Estimate(statistics.median(seconds), f"{known}, scaled by counted Gflops")


def _recorded(row: Row, selection: Selection, store: Store) -> Estimate | None:
    train = train_stage(row, selection.protocol, selection.seeds[0])
    return _recorded_training(train, selection, store)


def _recorded_training(train: Train, selection: Selection, store: Store) -> Estimate | None:
    """Return the time per image of a recorded training, whatever its seed."""
    for source in (store.here, store.reference):
        for seed in (*selection.seeds, *range(10)):
            record = source.latest(replace(train, seed=seed))
            if record is None or not matches_device(record, selection.device):
                continue
            rate = record.values.get("images_per_s")
            if rate:
                return Estimate(
                    record.provenance["world_size"] / rate,
                    f"recorded throughput on {record.provenance['device']}",
                )
    return None


def _published(row: Row, selection: Selection, store: Store) -> Estimate | None:
    """Return the time per image that Table 6 of the paper gives."""
    data = selection.protocol.data
    if selection.device == "cpu" or not is_latent(data):
        return None

    # Table 6 names the network alone, without training steps and guidance.
    network = re.split(r",| \(", row.label)[0]
    published = store.published("table6.csv", ("model", "resolution"))
    line = published.get(f"{network} {FACTOR * data.size}")
    if line is None:
        return None
    gpus, _, kind = line["gpus"].partition("x")
    images = int(line["training_steps"]) * int(line["global_batch_size"])
    seconds = int(gpus) * float(line["training_hours"]) * 3600 / images
    return Estimate(seconds, f"the paper's training time on {kind} (Table 6)")


def _macs(row: Row, selection: Selection, store: Store) -> float | None:
    """Return the counted operations of a network, if it is trained at the size that was counted."""
    stages = cost_stages(row)
    protocol = selection.protocol
    if len(stages) != 1 or protocol.small or stages[0].size != protocol.data.size:
        return None
    record = store.here.latest(stages[0]) or store.reference.latest(stages[0])
    return record.values["macs_core"] if record else None


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
