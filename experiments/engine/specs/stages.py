from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import (
    Backbone,
    Cost,
    Data,
    Evaluate,
    Recipe,
    Sampler,
    Timing,
    Train,
    is_latent,
)


@dataclass(frozen=True)
class Protocol:
    """`small` rows shrink the network by the row's own options; `source` says whose protocol it is.

    The recipe is common to all rows. A row's objective is its own method's, for its network is made for it; so is its
    sampler where the protocol's does not apply, with the protocol's guidance and at most its number of steps. Under an `own` protocol recipe and sampler too are the method's, and the protocol's serve rows without one.
    `cost_hours` is the expected time of a small training on a CPU core, for the plan that --dry-run prints.
    `start_from` is the protocol of the trainings that a row's `start` names; None is this protocol.
    """

    name: str
    data: Data
    recipe: Recipe
    sampler: Sampler
    num: int
    features: str
    labels: str
    small: bool
    source: str
    cost_hours: float | None = None
    own: bool = False
    start_from: Protocol | None = None


def network(row: Row, protocol: Protocol) -> Backbone:
    """The row's network as the protocol trains it; an upsampler sees two images."""
    data, backbone, images = at_data(row, protocol).data, row.backbone, 2 if _upsamples(row) else 1
    if protocol.small:
        backbone = row.small if isinstance(row.small, Backbone) else row.backbone.but(**row.small)
    return backbone.but(
        input_size=data.size, in_channels=images * data.channels, num_classes=data.num_classes
    )


def at_data(row: Row, protocol: Protocol) -> Protocol:
    """The protocol with what the row's network is trained on: its own data where it has some and runs as published; half the size
    before an upsampler."""
    if protocol.own and row.method and row.method.data:
        return replace(protocol, data=row.method.data)
    if row.upsampler and not is_latent(protocol.data):
        return replace(protocol, data=replace(protocol.data, size=protocol.data.size // 2))
    return protocol


def train_stage(row: Row, protocol: Protocol, seed: int) -> Train:
    """Of the row's network; `evaluate_stage(...).trainings` are those of the whole system."""
    stage = Train(network(row, protocol), at_data(row, protocol).data, protocol.recipe, seed=seed)
    if row.method is None:
        return stage
    undropped, diffusion = (
        replace(protocol.recipe, label_dropout=0.0),
        row.method.diffusion,
    )  # a network without a null label takes none
    recipe = (
        row.method.recipe
        if protocol.own
        else protocol.recipe
        if row.method.recipe.label_dropout
        else undropped
    )
    if _upsamples(row) and not protocol.own:
        diffusion = replace(diffusion, low_res=protocol.data.size // 2)
    start = (
        train_stage(row.start, protocol.start_from or protocol, seed)
        if row.start and protocol.own
        else None
    )
    return replace(stage, recipe=recipe, diffusion=diffusion, init_from=start)


def evaluate_stage(row: Row, protocol: Protocol, seed: int) -> Evaluate:
    """Of the whole system; on latents of its network alone, for a classifier that guides and an upsampler are made for pixels."""
    train, at = train_stage(row, protocol, seed), at_data(row, protocol)
    stage = Evaluate(
        train, sampler_of(row, protocol), protocol.num, protocol.features, protocol.labels
    )
    if row.classifier and not is_latent(train.data):
        stage = replace(stage, classifier=train_stage(row.classifier, at, seed))
    if row.upsampler and not is_latent(train.data):
        stage = replace(
            stage,
            upsampler=train_stage(row.upsampler, protocol, seed),
            upsampling=sampler_of(row.upsampler, protocol),
        )
    return stage


def _upsamples(row: Row) -> bool:
    return row.method is not None and row.method.diffusion.low_res is not None


def sampler_of(row: Row, protocol: Protocol) -> Sampler:
    """The protocol's sampler, or what takes its place where the row's objective needs another."""
    common, method = protocol.sampler, row.method
    if method is None:
        return common
    latent = is_latent(at_data(row, protocol).data)  # clipping and classifiers are made for pixels
    pixels = dict(
        clip=method.sampler.clip and not latent,
        classifier_scale=method.sampler.classifier_scale if row.classifier and not latent else 0.0,
    )
    if protocol.own:
        return replace(method.sampler, **pixels)
    common = replace(common, **pixels | dict(clip=pixels["clip"] or common.clip))
    if not method.recipe.label_dropout:  # without a null label there is nothing to guide by
        common = replace(common, scale=1.0)
    if (method.diffusion.name, method.diffusion.variance) == ("iddpm", "learned"):
        return common
    return replace(
        method.sampler,
        num_steps=min(method.sampler.num_steps, common.num_steps),
        scale=common.scale,
        channels=common.channels,
    )


def cost_stages(row: Row) -> tuple[Cost, ...]:
    """Counts of what makes the published system, else of its network at a 32 x 32 x 4 latent and 1000 classes."""
    return row.costs or (
        (Cost(row.backbone, size=32, channels=4, num_classes=1000),) if row.backbone else ()
    )


def cost_stage(row: Row) -> Cost:
    """Counts of a row that is one network."""
    (stage,) = cost_stages(row)
    return stage


def timing_stage(row: Row, baseline: Row, device: str) -> Timing:
    """Throughput at the row's own input beside the baseline's at its own, with attention unfused as in the paper's ablations (section 4.3).

    A batch is the paper's 64 on a GPU, but 16 for images of 512 pixels a side, of which 64 do not fit one.
    """
    (own, *parts), at = cost_stages(row), cost_stages(baseline)[0]
    batch = 4 if device != "cuda" else 16 if max(part.size for part in (own, *parts)) > 256 else 64
    other = None if (own.size, own.channels) == (at.size, at.channels) else (at.size, at.channels)
    kernels = {"attention": "reference"}
    return Timing(
        row.backbone,
        own.size,
        own.channels,
        own.num_classes,
        batch,
        device,
        "fp32",
        kernels,
        baseline.backbone,
        other,
        tuple(parts),
    )


def timed_rows(table: Table, rows: Sequence[Row], device: str, named: bool) -> list[Row]:
    """Those that are networks; on a CPU without the heavy ones, unless they were named."""
    if not table.timed or table.counts_only:
        return []
    return [row for row in rows if row.backbone and (device == "cuda" or named or not row.heavy)]
