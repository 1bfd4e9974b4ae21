"""Named bundles of data, recipe, sampler and scores. A table's rows are run under one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.engine.spec import Backbone, Cost, Data, Evaluate, Recipe, Row, Sampler, Timing, Train


@dataclass(frozen=True)
class Protocol:
    """`small` rows shrink the network by the row's own options; `source` says whose protocol it is.

    `cost_hours` is the expected time of one row on `hardware`, for the plan that --dry-run prints.
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
    cost_hours: float
    hardware: str


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
    hardware="2 CPU cores",
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
    cost_hours=11,
    hardware="8 A100",
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
    cost_hours=11,
    hardware="8 A100",
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
    cost_hours=256,
    hardware="64 A100 (DiCo-XL)",
)

IMAGENET256_3750K = replace(
    IMAGENET256,
    name="imagenet256_3750k",
    recipe=replace(IMAGENET256.recipe, steps=3_750_000),
    source="DiCo paper, Table 6 (DiCo-XL)",
    cost_hours=266,
    hardware="32 A100",
)

IMAGENET256_H = replace(
    IMAGENET256,
    name="imagenet256_h",
    recipe=Recipe(steps=1_000_000, batch=1024, lr=2e-4, betas=(0.99, 0.99), warmup=5000),
    source="DiCo paper, Table 6 (DiCo-H)",
    cost_hours=113,
    hardware="64 A100",
)

IMAGENET512_3000K = replace(
    IMAGENET512,
    name="imagenet512_3000k",
    recipe=replace(IMAGENET512.recipe, steps=3_000_000),
    source="DiCo paper, Table 6 (DiCo-XL)",
    cost_hours=256,
    hardware="64 A100",
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (DIGITS, CIFAR10, IMAGENET256, IMAGENET256_3750K, IMAGENET256_H, IMAGENET512, IMAGENET512_3000K)
}


def network(row: Row, protocol: Protocol) -> Backbone:
    """The row's network as the protocol trains it."""
    data = protocol.data
    backbone = row.backbone.but(**row.small) if protocol.small else row.backbone
    return backbone.but(input_size=data.size, in_channels=data.channels, num_classes=data.num_classes)


def train_stage(row: Row, protocol: Protocol, seed: int) -> Train:
    return Train(network(row, protocol), protocol.data, protocol.recipe, seed=seed)


def evaluate_stage(row: Row, protocol: Protocol, seed: int) -> Evaluate:
    return Evaluate(train_stage(row, protocol, seed), protocol.sampler, protocol.num, protocol.features, protocol.labels)


def cost_stage(row: Row) -> Cost:
    """Counts at the paper's input: a 32 x 32 x 4 latent and 1000 classes."""
    return Cost(row.backbone, size=32, channels=4, num_classes=1000)


def timing_stage(row: Row, baseline: Row, device: str) -> Timing:
    """Throughput at the paper's input beside the baseline's, with attention unfused as in its ablations (section 4.3)."""
    batch = 64 if device == "cuda" else 4
    return Timing(row.backbone, 32, 4, 1000, batch, device, kernels={"attention": "reference"}, baseline=baseline.backbone)
