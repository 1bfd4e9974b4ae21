"""What memory the trainings of a plan need in one process, from predicted lines. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.efficiency.memory import (
    GB,
    Key,
    Needs,
    Parts,
    Settings,
    averages_of,
    network_id,
    read_needs,
    split_needs,
)
from experiments.engine.specs.spec import Train

# Numeric modes in which tensors are as wide as in fp32.
AS_FP32 = ("tf32", "as_published")


@dataclass(frozen=True)
class Share:
    """How a process takes its part of a training's batches."""

    settings: Settings = field(default_factory=Settings)
    # Images of a micro-batch; None: the whole share.
    micro_batch: int | None = None
    recompute: bool = False


def known_needs(store: Store) -> dict[Key, Needs]:
    """Read what is predicted in the results folder, and in that of this repository."""
    return read_needs(REPOSITORY / "results") | read_needs(store.root)


def memory_of(train: Train, share: Share, known: Mapping[Key, Needs]) -> tuple[Parts, int] | None:
    """Return what a process needs, and at how many images; None if that is not predicted.

    A teacher or an encoder beside the network is not predicted.
    """
    if train.distillation or train.alignment:
        return None
    mode = train.recipe.precision
    mode = "fp32" if mode in AS_FP32 else mode
    needs = known.get((network_id(train.backbone), mode, share.recompute))
    if needs is None:
        return None

    # A process takes its share of the batch at once, or in micro-batches.
    processes = share.settings.processes
    own = max(1, train.recipe.batch // processes)
    images = min(share.micro_batch or own, own)
    settings = Settings(processes, share.settings.sharding, images < own, averages_of(train.recipe))
    return split_needs(needs, settings, images), images


def describe_parts(parts: Parts, images: int) -> str:
    """Return what the memory of a process is made of."""
    return (
        f"parameters {amount(parts.parameters)}, gradients {amount(parts.gradients)}, AdamW "
        f"{amount(parts.optimiser)}, average {amount(parts.averages)}, activations "
        f"{amount(parts.activations)} at {images} image{'' if images == 1 else 's'}"
    )


def amount(number: float) -> str:
    """Return bytes in the unit that suits them."""
    if number >= 10 * GB:
        return f"{number / GB:.1f} GB"
    return f"{number / GB:.2f} GB" if number >= GB else f"{number / 1e6:.0f} MB"
