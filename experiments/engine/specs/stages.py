"""From a declared row and a protocol to specs. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.engine.specs.rows import Method, Row, Table
from experiments.engine.specs.spec import (
    LATENT_CHANNELS,
    Backbone,
    Cost,
    Data,
    Diffusion,
    Distillation,
    Evaluate,
    HeldOut,
    Recipe,
    Sampler,
    Timing,
    Train,
    is_latent,
    spec_id,
)
from experiments.engine.specs.weights import Weights

# The input that published counts and throughputs are of, unless a row says otherwise.
LATENT_SIZE = 32
IMAGENET_CLASSES = 1000
# Images per batch of a timing: the paper's on a GPU, fewer for images of 512 pixels per side, of
# which 64 do not fit one GPU. A CPU takes few, but as many as a training where images are small.
GPU_BATCH = 64
GPU_BATCH_LARGE = 16
LARGE_SIZE = 256
CPU_BATCH = 4
CPU_BATCH_SMALL = 64
SMALL_SIZE = 8


@dataclass(frozen=True)
class HeldOutScore:
    """How a protocol measures the loss on held-out images."""

    # Number of images; None: all of the part.
    num: int | None = None
    # Times and noises that every image meets in each bin of log SNR.
    draws: int = 1


@dataclass(frozen=True)
class Protocol:
    """Data, recipe, sampler and scores under which rows are run.

    The recipe is common to all rows. A row's objective is that of its own method, since the network
    is made for it, unless the protocol has one. A row's sampler is its method's where the
    protocol's does not apply; guidance and the largest number of steps remain the protocol's.
    """

    name: str
    data: Data
    recipe: Recipe
    sampler: Sampler
    # Number of images that are scored.
    num: int
    # What the scores are computed on.
    features: str
    # Policy of the labels.
    labels: str
    # Whether networks are shrunk by each row's own options.
    small: bool
    # Whose protocol it is.
    source: str
    # Expected hours of a small training on a CPU core, for the plan that --dry-run prints.
    cost_hours: float | None = None
    # Whether recipe, sampler and data are each row's own, where its method has them.
    own: bool = False
    # The objective of all rows; None: each row's own.
    diffusion: Diffusion | None = None
    # Protocol of the trainings that a row's `start` and `tuning` name; None: this one.
    start_from: Protocol | None = None
    # Whether shrunk networks are brought to equal MACs, by each row's `matched`.
    matched: bool = False
    # How held-out images are scored; None: they are not.
    heldout: HeldOutScore | None = None
    # Learning rates among which every network's own rate is chosen, rising.
    ladder: tuple[float, ...] = ()
    # Each network's own learning rate, by its `network_id`; the recipe's holds for others.
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    # Sampling seeds on which a sweep chooses, and others on which it reports its choice.
    selection_seeds: tuple[int, ...] = (1000,)
    report_seeds: tuple[int, ...] = (0, 1, 2)
    # Labels of the only rows that it is declared for; (): all.
    rows: tuple[str, ...] = ()
    # What shrunk networks need to read its captions, in place of the rows' own options.
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


def network(row: Row, protocol: Protocol) -> Backbone:
    """Return the row's network as the protocol trains it."""
    backbone = row.require_backbone()
    data = at_data(row, protocol).data
    if protocol.small:
        small = row.small
        backbone = small if isinstance(small, Backbone) else backbone.but(**small)
        backbone = backbone.but(**protocol.options)
    if protocol.matched:
        backbone = backbone.but(**row.matched.get(data.size, {}))

    # What predicts tokens sees no image.
    if row.predicts_tokens:
        return backbone.but(num_classes=data.num_classes)

    # An upsampler sees two images: the noisy one and the small one.
    in_channels = 2 * data.channels if row.is_upsampler else data.channels
    return backbone.but(input_size=data.size, in_channels=in_channels, num_classes=data.num_classes)


@dataclass(frozen=True)
class FineTuned:
    """What tells the fine-tunings of networks apart, whatever the protocol."""

    network: Backbone
    parent: Backbone
    share: float
    diffusion: Diffusion


def network_id(row: Row, protocol: Protocol) -> str:
    """Return what names a row's network among those that a protocol trains.

    Rows share the id of a network that they share. A network that is fine-tuned has another id.
    """
    backbone = replace(network(row, protocol), code="")
    if row.tuning is None:
        return spec_id(backbone)
    parent = replace(network(row.tuning.parent, protocol), code="")
    diffusion = row.method.diffusion if row.method else Diffusion()
    return spec_id(FineTuned(backbone, parent, row.tuning.share, diffusion))


def declared_rows(rows: Sequence[Row], protocol: Protocol, named: bool) -> list[Row]:
    """Return the rows without networks that a protocol is not declared for.

    Raises:
        ValueError: None is left, or the user named one of the others.
    """
    others = [row.label for row in rows if row.backbone and row.label not in protocol.rows]
    if not protocol.rows or not others:
        return list(rows)
    if named or len(others) == len(rows):
        raise ValueError(
            f"protocol {protocol.name} is declared for {', '.join(protocol.rows)}, and not for "
            f"{others[0]}; choose among these rows, or another protocol"
        )
    return [row for row in rows if row.label not in others]


def distinct_networks(table: Table, protocol: Protocol) -> list[Row]:
    """Return the table's rows with a network, the first of those that share one."""
    rows: dict[str, Row] = {}
    for row in table.rows:
        if row.backbone:
            rows.setdefault(network_id(row, protocol), row)
    return list(rows.values())


def at_data(row: Row, protocol: Protocol) -> Protocol:
    """Return the protocol with the data that the row's network is trained on.

    These are the protocol's data, the row's own data under `own`, or half the size for the first
    network of a cascade.
    """
    if protocol.own and row.method and row.method.data:
        return replace(protocol, data=row.method.data)
    if row.upsampler and not is_latent(protocol.data):
        return replace(protocol, data=replace(protocol.data, size=protocol.data.size // 2))
    return protocol


def train_stage(row: Row, protocol: Protocol, seed: int) -> Train:
    """Return the training of the row's network.

    `evaluate_stage(...).trainings` are those of the whole system.
    """
    data = at_data(row, protocol).data
    backbone = network(row, protocol)
    start = _start_of(row, protocol, seed)
    rate = protocol.rates.get(network_id(row, protocol))
    if rate is not None:
        protocol = replace(protocol, recipe=replace(protocol.recipe, lr=rate))
    if row.tuning:
        protocol = replace(protocol, recipe=_shortened(protocol.recipe, row.tuning.share))
    stage = Train(
        backbone, data, protocol.recipe, seed=seed, init_from=start, alignment=row.alignment
    )

    # A row may learn from another one's network, which this project then trains first.
    if row.teacher:
        teacher = train_stage(row.teacher, protocol, seed)
        stage = replace(stage, distillation=Distillation(teacher, row.mimics))

    # A row without a method of its own follows the protocol's recipe.
    if protocol.diffusion is not None:
        stage = replace(stage, diffusion=protocol.diffusion)
    if row.method is None:
        return stage
    return replace(
        stage,
        recipe=_recipe_of(row.method, protocol),
        diffusion=_diffusion_of(row.method, protocol),
        tokenizer=row.method.tokenizer,
    )


def _start_of(row: Row, protocol: Protocol, seed: int) -> Train | Weights | None:
    """Return what a row starts from: a file, or another row, which this project trains first."""
    if row.tuning:
        return train_stage(row.tuning.parent, protocol.start_from or protocol, seed)
    if row.start is None or isinstance(row.start, Weights):
        return row.start
    return train_stage(row.start, protocol.start_from or protocol, seed) if protocol.own else None


def _shortened(recipe: Recipe, share: float) -> Recipe:
    """Return a recipe of fewer steps, with as much of them in its warm-up and in its average."""
    return replace(
        recipe,
        steps=round(share * recipe.steps),
        warmup=round(share * recipe.warmup),
        ema=round(1 - (1 - recipe.ema) / share, 6),
    )


def _recipe_of(method: Method, protocol: Protocol) -> Recipe:
    if protocol.own:
        return method.recipe
    if method.recipe.label_dropout:
        return protocol.recipe
    # A network without a null label cannot be trained on it.
    return replace(protocol.recipe, label_dropout=0.0)


def _diffusion_of(method: Method, protocol: Protocol) -> Diffusion:
    if protocol.diffusion is not None:
        return protocol.diffusion

    # An upsampler's small image is half as large as the protocol's images.
    if method.diffusion.low_res is not None and not protocol.own:
        return replace(method.diffusion, low_res=protocol.data.size // 2)
    return method.diffusion


def evaluate_stage(row: Row, protocol: Protocol, seed: int) -> Evaluate:
    """Return the evaluation of the row's whole system.

    On latents, only the network itself is evaluated: classifiers that guide and upsamplers are made
    for pixels.
    """
    train = train_stage(row, protocol, seed)
    sampler = sampler_of(row, protocol)
    stage = Evaluate(train, sampler, protocol.num, protocol.features, protocol.labels)
    if not train.data.num_classes and sampler.scale != 1:
        raise ValueError(
            f"protocol {protocol.name} guides by scale {sampler.scale:g}, and its data have no "
            "classes to guide by; declare Sampler(scale=1)"
        )
    if is_latent(train.data):
        return stage

    # Pixels have the rest of the system: a classifier that guides, and an upsampler.
    if row.classifier:
        classifier = train_stage(row.classifier, at_data(row, protocol), seed)
        stage = replace(stage, classifier=classifier)
    if row.upsampler:
        stage = replace(
            stage,
            upsampler=train_stage(row.upsampler, protocol, seed),
            upsampling=sampler_of(row.upsampler, protocol),
        )

    return stage


def heldout_stage(row: Row, protocol: Protocol, seed: int, part: str = "test") -> HeldOut | None:
    """Return the loss of a row's network on a held-out part; None if the protocol has no such part.

    Of a system, this is the loss of the network that makes the first images.
    """
    score = protocol.heldout
    if score is None:
        return None
    return HeldOut(train_stage(row, protocol, seed), part, score.num, score.draws)


def sampler_of(row: Row, protocol: Protocol) -> Sampler:
    """Return the protocol's sampler, or what the row's objective needs in its place."""
    method = row.method
    if method is None or protocol.diffusion is not None:
        return protocol.sampler

    # Clipping and classifiers are made for pixels.
    in_pixels = not is_latent(at_data(row, protocol).data)
    clip = method.sampler.clip and in_pixels
    guided_by_classifier = row.classifier is not None and in_pixels
    classifier_scale = method.sampler.classifier_scale if guided_by_classifier else 0.0
    if protocol.own:
        return replace(method.sampler, clip=clip, classifier_scale=classifier_scale)

    common = replace(
        protocol.sampler,
        clip=clip or protocol.sampler.clip,
        classifier_scale=classifier_scale,
    )
    if method.tokenizer:
        return replace(method.sampler, scale=protocol.sampler.scale)
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
    """Return the counts of the networks that make the published system.

    A row that declares none is its network alone, at a 32 x 32 x 4 latent and 1000 classes.
    """
    if row.costs:
        return row.costs
    if row.backbone is None:
        return ()
    return (Cost(row.backbone, LATENT_SIZE, LATENT_CHANNELS, IMAGENET_CLASSES),)


def cost_stage(row: Row) -> Cost:
    """Return the counts of a row that is one network."""
    (stage,) = cost_stages(row)
    return stage


def timing_stage(row: Row, baseline: Row, device: str) -> Timing:
    """Return the throughput at the row's own input, beside the baseline's at its own.

    Attention is unfused, as in the paper's ablations (section 4.3).
    """
    own, *parts = cost_stages(row)
    at = cost_stages(baseline)[0]

    # An input that both share is not repeated in the spec.
    same_input = (own.size, own.channels) == (at.size, at.channels)
    return Timing(
        row.require_backbone(),
        own.size,
        own.channels,
        own.num_classes,
        _timing_batch([own, *parts], device),
        device,
        kernels={"attention": "reference"},
        baseline=baseline.backbone,
        baseline_input=None if same_input else (at.size, at.channels),
        parts=tuple(parts),
        tokenizer=own.tokenizer,
    )


def _timing_batch(networks: Sequence[Cost], device: str) -> int:
    largest = max(part.size for part in networks)
    if device != "cuda":
        return CPU_BATCH_SMALL if largest <= SMALL_SIZE else CPU_BATCH
    return GPU_BATCH_LARGE if largest > LARGE_SIZE else GPU_BATCH


def timed_rows(table: Table, rows: Sequence[Row], device: str, named: bool) -> list[Row]:
    """Return the rows that are timed: the networks, on a CPU without heavy ones unless named."""
    if not table.timed:
        return []
    return [row for row in rows if row.backbone and (device == "cuda" or named or not row.heavy)]
