"""Named bundles of data, recipe, sampler and scores. A table's rows are run under one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.engine.rows import Row, Table
from experiments.engine.sources import is_latent
from experiments.engine.spec import Backbone, Cost, Data, Evaluate, Recipe, Sampler, Timing, Train


@dataclass(frozen=True)
class Protocol:
    """`small` rows shrink the network by the row's own options; `source` says whose protocol it is.

    The recipe is common to all rows. A row's objective is its own method's, for its network is made for it; so is its
    sampler where the protocol's does not apply, with the protocol's guidance and at most its number of steps. Under an `own` protocol recipe and sampler too are the method's, and the protocol's serve rows without one.
    `cost_hours` is the expected time of a small training on a CPU core, for the plan that --dry-run prints.
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


DIGITS = Protocol(
    name="digits",
    data=Data("digits", size=8, channels=1, num_classes=10),
    recipe=Recipe(steps=650, batch=64, lr=5e-3, warmup=50, decay="cosine", ema=0.99),
    sampler=Sampler(num_steps=50, channels=None),
    num=500,
    features="digits",
    labels="balanced",
    small=True,
    source="this suite: scikit-learn's 8x8 digits, scores on a small classifier's features",
    cost_hours=40 / 3600,
)

DIGITS_LONG = replace(
    DIGITS,
    name="digits_long",
    recipe=replace(DIGITS.recipe, steps=2000),
    source="protocol digits with three times its steps, for the families that it leaves near chance: U-ViT, DiS, DiM, DiffuSSM",
    cost_hours=300 / 3600,
)

CIFAR10 = Protocol(
    name="cifar10",
    data=Data("cifar10", size=32, channels=3, num_classes=10, flip=True),
    recipe=Recipe(steps=400_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="the ImageNet recipe in pixel space",
)

CIFAR10_CLASSIFIER = replace(
    CIFAR10,
    name="cifar10_classifier",
    features="cifar_classifier",
    source="protocol cifar10, its very trainings, scored without Inception on the features of a CIFAR-10 classifier that the suite trains",
)

CIFAR10_BF16 = replace(
    CIFAR10_CLASSIFIER,
    name="cifar10_bf16",
    recipe=replace(CIFAR10.recipe, steps=4000, precision="bf16", ema=0.999),
    sampler=Sampler("ddim", num_steps=25, channels=None, clip=True),
    num=5000,
    source="protocol cifar10_classifier cut down to an hour of one H200 for a seed of Table 4, by its rows' counted Gflops and the assumption "
    "of 100 TFLOP/s in bf16, a tenth of the peak, and 20 TFLOP/s in the sampler's fp32: 48 minutes of training and 10 of sampling",
)

CIFAR10_SMALL = Protocol(
    name="cifar10_small",
    data=CIFAR10.data,
    recipe=Recipe(steps=300, batch=16, lr=5e-3, warmup=30, decay="cosine", ema=0.98),
    sampler=Sampler("ddim", num_steps=10, channels=None, clip=True),
    num=500,
    features="cifar_classifier",
    labels="balanced",
    small=True,
    source="this suite: protocol cifar10_classifier cut down to what a CPU finishes, with small networks",
    cost_hours=75 / 3600,
)

IMAGENET256 = Protocol(
    name="imagenet256",
    data=Data("imagenet256", size=32, channels=4, num_classes=1000, flip=True),
    recipe=Recipe(steps=400_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="DiCo paper, Table 6 and section 4.1",
)

IMAGENET256_GUIDED = replace(
    IMAGENET256,
    name="imagenet256_guided",
    recipe=replace(IMAGENET256.recipe, steps=3_750_000),
    sampler=Sampler(scale=1.4),
    source="DiCo paper, Tables 1 and 6; the guidance scale is the authors' (README)",
)

IMAGENET256_FIXED = replace(
    IMAGENET256,
    name="imagenet256_fixed",
    data=replace(IMAGENET256.data, latents="fixed"),
    source="DiCo's code: one stored posterior sample of each image and of its flip, where DiT draws anew at every visit",
)

IMAGENET512 = Protocol(
    name="imagenet512",
    data=Data("imagenet512", size=64, channels=4, num_classes=1000, flip=True),
    recipe=Recipe(steps=1_300_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="DiCo paper, Tables 2 and 6",
)

IMAGENET512_FIXED = replace(
    IMAGENET512,
    name="imagenet512_fixed",
    data=replace(IMAGENET512.data, latents="fixed"),
    source=IMAGENET256_FIXED.source,
)

OWN = "each system by the recipe and the sampler of its own paper"
IMAGENET256_OWN = replace(IMAGENET256, name="imagenet256_own", own=True, source=OWN)
IMAGENET512_OWN = replace(IMAGENET512, name="imagenet512_own", own=True, source=OWN)

_ALL = (
    DIGITS, DIGITS_LONG, CIFAR10, CIFAR10_CLASSIFIER, CIFAR10_BF16, CIFAR10_SMALL,
    IMAGENET256, IMAGENET256_FIXED, IMAGENET256_GUIDED, IMAGENET512, IMAGENET512_FIXED, IMAGENET256_OWN, IMAGENET512_OWN,
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


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
    start = train_stage(row.start, IMAGENET256_OWN, seed) if row.start and protocol.own else None
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
