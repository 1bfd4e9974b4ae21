"""Scores of images that captions of digits describe, and when a training begins to bind them.

A judge reads the cells that captions name, of samples and of real canvases of the same captions,
made of digits that no training has seen. Compositions that are never trained on are scored apart.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.engine.data.captioned.digits import CaptionedDigits
from experiments.engine.data.captioned.grammar import NAMES, Caption, Group
from experiments.engine.data.sets import Part, load
from experiments.engine.judges.cells import cell_judge
from experiments.engine.judges.classifiers import Identity
from experiments.engine.numerics.weights import digest
from experiments.engine.records.score_names import CAPTION_SCORES, FD_TEXT, FD_TEXT_HELD_OUT
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import Arrays
from experiments.engine.sampling.batches import batch_of, draw_in_batches
from experiments.engine.sampling.networks import load_networks
from experiments.engine.scoring.captioned.reading import Reading, read
from experiments.engine.scoring.outcome import Scored, label_histogram
from experiments.engine.specs.spec import Evaluate, Train, spec_id
from experiments.engine.texts.tables import give_captions
from experiments.engine.training.averages import load_snapshot, snapshot_steps
from experiments.engine.training.networks import build

# Share of pairs painted as they are named from which a network is said to bind words to places.
BOUND = 0.5
# Steps of the sampler along a training.
COURSE_STEPS = 10
# Seeds of the real canvases: of those that samples are compared with, and of those scored beside.
REFERENCE, BESIDE = 0, 1


@dataclass(frozen=True)
class Drawn:
    """Canvases in the order of their index, with their captions."""

    canvases: Tensor  # (N, 1, H, W)
    labels: Tensor  # (N,)
    # How often the network was evaluated for all of them.
    evaluated: int


@dataclass(frozen=True)
class Judge:
    """What reads canvases of a set."""

    network: nn.Module
    identity: Identity
    captions: tuple[Caption, ...]

    def read(self, drawn: Drawn) -> Reading:
        """Read canvases by their captions."""
        return read(self.network, drawn.canvases, drawn.labels, self.captions)


def score_captioned(spec: Evaluate, cache: Path, context: RunContext) -> Scored | None:
    """Sample by captions and score what the canvases show; ranks but the first return None.

    Of a training that stored averages on its way, each is sampled too, once by every caption.

    Args:
        spec: what is scored.
        cache: folder of the judge.
        context: of the run; its folder is that of the training.

    Raises:
        ValueError: the data are not captioned digits.
    """
    if spec.data.name not in NAMES:
        raise ValueError(
            f"features {spec.features} read captioned digits ({', '.join(NAMES)}), not "
            f"{spec.data.name}"
        )
    real = load(spec.data, Part.TEST)
    assert isinstance(real, CaptionedDigits)
    network, identity = cell_judge(cache)
    judge = Judge(network, identity, real.captions)

    # The pieces wait in a folder that names all that decides them.
    sampled, key, noted = load_networks(spec, context)
    weights = digest(sampled)
    batch = batch_of(context)
    parts = context.folder / f"samples-{spec_id(spec)}-{batch}-{weights}"
    drawn = _draw(spec, sampled, parts, context)
    warnings = list(noted)
    course = _follow_course(spec, judge, parts, context, warnings.append)
    if drawn is None:
        return None

    reference = _draw_real(real, drawn.labels, REFERENCE)
    values: dict[str, Any] = {"num": spec.num, "nfe": drawn.evaluated / spec.num}
    values |= _scores(judge.read(drawn), judge.read(reference))
    beside = _scores(judge.read(_draw_real(real, drawn.labels, BESIDE)), judge.read(reference))
    values |= {f"{name}_real": value for name, value in beside.items()}
    values |= course | judge.identity
    if warnings:
        values["warnings"] = warnings
    shutil.rmtree(parts, ignore_errors=True)
    return Scored(values, weights, key, batch, _measure(spec, reference, judge))


def _draw(spec: Evaluate, network: nn.Module, folder: Path, context: RunContext) -> Drawn | None:
    """Sample all images of a spec, each rank its share of the batches; None but on the first."""

    def keep(x: Tensor, y: Tensor) -> Arrays:
        return {"canvases": x.numpy(), "labels": y.numpy()}

    batches = draw_in_batches(spec, network, folder, context, keep)
    if batches is None:
        return None
    canvases, labels = (
        torch.from_numpy(np.concatenate([arrays[name] for arrays in batches]))
        for name in ("canvases", "labels")
    )
    return Drawn(canvases, labels, sum(int(arrays["evaluated"]) for arrays in batches))


def _draw_real(real: CaptionedDigits, labels: Tensor, seed: int) -> Drawn:
    """Return real canvases of the captions (N,)."""
    canvases, _ = real.take(labels, seed, torch.arange(len(labels)))
    return Drawn(canvases, labels, 0)


def _follow_course(
    spec: Evaluate,
    judge: Judge,
    folder: Path,
    context: RunContext,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Return how well pairs were painted along the training, if it stored its averages.

    The step of binding is the first one after which BOUND of all pairs, seen or not, are painted as
    they are named; None if there is none.
    """
    training = spec.train
    if not isinstance(training, Train) or not training.recipe.power_snapshots:
        return {}
    model = build(training.backbone, training.seed, context.device)
    give_captions(model, training.data)
    sampler = replace(spec.sampler, num_steps=COURSE_STEPS)
    once = replace(spec, num=len(judge.captions), labels="balanced", sampler=sampler)

    # Every average draws the same noises.
    steps = snapshot_steps(training.recipe)
    shares: dict[Group, list[float]] = {Group.SEEN: [], Group.HELD_OUT: []}
    bound = []
    for step in steps:
        load_snapshot(model, training, context.folder, step, warn)
        drawn = _draw(once, model.eval(), folder / f"step-{step}", context)
        if drawn is None:
            continue
        reading = judge.read(drawn)
        for group, course in shares.items():
            course.append(reading.mean("all", group)[0])
        pairs = reading.groups != Group.SINGLE.value
        bound.append(reading.scores["all"][pairs].mean() >= BOUND)

    found = [step for step, is_bound in zip(steps, bound, strict=False) if is_bound]
    courses = {f"all_{group.value}": course for group, course in shares.items()}
    return {"course": {"steps": steps, **courses}, "binding_step": min(found, default=None)}


def _scores(reading: Reading, reference: Reading) -> dict[str, float]:
    """Return all scores with their errors by their keys in records."""
    values = {}
    distances = {FD_TEXT: reading.distance(reference)}
    distances[FD_TEXT_HELD_OUT] = reading.distance(reference, Group.HELD_OUT)
    means = {
        score: reading.mean(name, Group(group)) for (name, group), score in CAPTION_SCORES.items()
    }
    for score, (value, error) in (distances | means).items():
        values[score.key] = value
        values[score.error] = error
    return values


def _measure(spec: Evaluate, reference: Drawn, judge: Judge) -> dict[str, Any]:
    """Return what a manifest says of the measurement."""
    return {
        "decoder": {"name": "none: pixels"},
        "quantiser": "none",
        "image": {"size": spec.data.size, "format": "float32"},
        "labels": {
            "histogram_sha256": label_histogram(reference.labels.numpy()),
            "order": "as drawn",
        },
        "extractor": {"sha256": judge.identity["classifier_sha256"], "dtype": "fp32"},
        "reference": {
            "name": spec.data.name,
            "split": Part.TEST.value,
            "num_images": len(reference.canvases),
            "sha256": hashlib.sha256(reference.canvases.numpy().tobytes()).hexdigest(),
        },
    }
