"""Scores on the features of a small classifier, for sets too small for Inception."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from experiments.engine.autoregressive.scales import ScaleSystem
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import ImageSet, Part, load, load_cifar10, unfolded
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.objectives import HasGates, has_gates
from experiments.engine.judges.cifar import load_judge
from experiments.engine.judges.classifiers import (
    Identity,
    accuracy,
    cifar_classifier,
    digits_classifier,
    digits_judge,
    extract,
)
from experiments.engine.numerics.weights import digest
from experiments.engine.records.score_names import CLASSIFIER_SCORES, DIGITS_JUDGE, JUDGES
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import Arrays
from experiments.engine.sampling.batches import batch_of, draw_in_batches
from experiments.engine.sampling.networks import load_networks
from experiments.engine.sampling.samples import QUANTISER
from experiments.engine.scoring.copies import check_copies, part_features
from experiments.engine.scoring.frechet import frechet, frechet_se
from experiments.engine.scoring.metrics import inception_score, proportion_se
from experiments.engine.scoring.moments import Moments
from experiments.engine.scoring.neighbours import NEIGHBOURS, precision_recall
from experiments.engine.scoring.outcome import Scored, label_histogram
from experiments.engine.specs.spec import Evaluate, spec_id
from experiments.engine.timing.gates import BATCH, time_gates


@dataclass(frozen=True)
class Classifier:
    """A classifier with the images that samples are compared with."""

    network: nn.Module
    identity: Identity
    reference: ImageSet
    # Part of the set that the reference is; None for the whole set.
    split: str | None
    # Whether samples are scored as 8-bit images, or as the network gives them.
    quantised: bool

    def extract(self, x: Tensor) -> tuple[ndarray, ndarray]:
        """Return features and class probabilities of samples."""
        return extract(self.network, from_uint8(to_uint8(x)) if self.quantised else x)


@dataclass(frozen=True)
class Samples:
    """What the scores need of N samples."""

    features: ndarray  # (N, d)
    probabilities: ndarray  # (N, C)
    labels: ndarray  # (N,)
    # Moments of the features, merged batch by batch.
    moments: Moments
    # How often the network was evaluated for all of them.
    evaluated: int
    # Of a network with gates: the share of its gated work in each evaluation.
    shares: list[ndarray]


def score_classified(spec: Evaluate, cache: Path, context: RunContext) -> Scored | None:
    """Sample and score on a classifier's features; the scores bear its name.

    Digits are scored against all digits, quantised images against CIFAR-10's test images. A judge
    scores against the test part, and says whether samples copy the training part. The error
    of fd comes from its influence function, that of is from a jackknife, those of shares are
    binomial. Ranks but the first return None.

    Args:
        spec: what is scored.
        cache: folder of the classifiers.
        context: of the run; its folder is that of the training.
    """
    device = context.device
    batch = batch_of(context)
    classifier = _load_classifier(spec, cache)
    network, key, noted = load_networks(spec, context)
    warnings = list(noted)
    if "classifier_warning" in classifier.identity:
        warnings.append(str(classifier.identity.pop("classifier_warning")))

    # The pieces wait in a folder that names all that decides them.
    weights = digest(network)
    parts = context.folder / f"samples-{spec_id(spec)}-{batch}-{weights}"
    samples = _draw_samples(spec, network, classifier, parts, context)
    if samples is None:
        return None
    values = _scores(spec, samples, classifier, device)
    if isinstance(network, nn.Module) and has_gates(network):
        values |= _describe_gates(spec, network, classifier, device)
    if spec.features in JUDGES:
        sha256 = str(classifier.identity["classifier_sha256"])
        known = part_features(spec.data, classifier.network, sha256, cache)
        values |= check_copies(samples.features, known)
    if isinstance(network, ScaleSystem):
        values |= network.identity
    if warnings:
        values["warnings"] = warnings
    shutil.rmtree(parts, ignore_errors=True)
    return Scored(values, weights, key, batch, _measure(spec, samples, classifier))


def _load_classifier(spec: Evaluate, cache: Path) -> Classifier:
    if spec.features == "digits":
        digits = load(spec.data)
        assert isinstance(digits, ImageSet)
        network, identity = digits_classifier(digits, cache)
        return Classifier(network, identity, digits, split=None, quantised=False)
    if spec.features == "cifar_classifier":
        test = load_cifar10(spec.data, "test")
        network, identity = cifar_classifier(spec.data, test, cache)
        return Classifier(network, identity, test, split="test", quantised=True)
    return _load_judge(spec, cache)


def _load_judge(spec: Evaluate, cache: Path) -> Classifier:
    """Load a judge, which saw the training part alone, with the test part as reference."""
    pixels = unfolded(spec.data)
    test = load(pixels, Part.TEST)
    assert isinstance(test, ImageSet)
    if spec.features == DIGITS_JUDGE:
        train = load(pixels)
        assert isinstance(train, ImageSet)
        network, identity = digits_judge(train, test, cache)
        return Classifier(network, identity, test, split="test", quantised=False)

    # CIFAR-10's judge is committed.
    network, sha256 = load_judge()
    identity = {"classifier_sha256": sha256, "classifier_accuracy": accuracy(network, test)}
    return Classifier(network, identity, test, split="test", quantised=True)


def _draw_samples(
    spec: Evaluate, network: nn.Module, classifier: Classifier, folder: Path, context: RunContext
) -> Samples | None:
    """Sample and classify all images, each rank its share of the batches; None but on the first."""

    def classify(x: Tensor, y: Tensor) -> Arrays:
        features, probabilities = classifier.extract(x)
        return {"features": features, "probabilities": probabilities, "labels": y.numpy()}

    # Only the first rank has all batches.
    batches = draw_in_batches(spec, network, folder, context, classify)
    if batches is None:
        return None
    moments = Moments(batches[0]["features"].shape[1])
    for arrays in batches:
        moments.update(arrays["features"])
    features, probabilities, labels = (
        np.concatenate([arrays[name] for arrays in batches])
        for name in ("features", "probabilities", "labels")
    )
    evaluated = sum(int(arrays["evaluated"]) for arrays in batches)
    shares = [arrays["shares"] for arrays in batches if "shares" in arrays]
    return Samples(features, probabilities, labels, moments, evaluated, shares)


def _describe_shares(samples: Samples) -> dict[str, float]:
    """Return mean and spread, over images and steps, of the share of gated work that was done."""
    if not samples.shares:
        return {}
    shares = np.concatenate(samples.shares)
    return {"used_share": float(shares.mean()), "used_share_sd": float(shares.std(ddof=1))}


def _describe_gates(
    spec: Evaluate, network: nn.Module, classifier: Classifier, device: torch.device
) -> dict[str, float]:
    """Return the work that gates can switch off, and how much faster the network is for them."""
    x0, y = classifier.reference.take(torch.arange(min(BATCH, len(classifier.reference))))
    process = build_diffusion(spec.train.diffusion).to(device)
    assert isinstance(process, IDDPM)
    gated = cast(HasGates, network)
    seconds = time_gates(gated, process, spec.sampler.num_steps, x0.to(device), y.to(device))
    return {"gated_macs": float(gated.gated_work), **seconds}


def _scores(
    spec: Evaluate, samples: Samples, classifier: Classifier, device: torch.device
) -> dict[str, Any]:
    # The reference goes through the classifier as it is.
    images, _ = classifier.reference.take(torch.arange(len(classifier.reference)))
    real, _ = extract(classifier.network, images)
    real_moments = Moments(real.shape[1])
    real_moments.update(real)

    # Labels whose counts were fixed lower the error of the distance.
    fixed = samples.labels if spec.labels == "balanced" else None
    fd_se = frechet_se(samples.features, samples.moments, real_moments, fixed)
    score, score_se = inception_score(samples.probabilities)
    precision, recall = precision_recall(samples=samples.features, reference=real, device=device)
    agreement = float((samples.probabilities.argmax(1) == samples.labels).mean())

    names = CLASSIFIER_SCORES[spec.features]
    return {
        "num": spec.num,
        "nfe": samples.evaluated / spec.num,
        **_describe_shares(samples),
        names.distance.key: frechet(samples.moments, real_moments),
        names.distance.error: fd_se,
        names.inception.key: score,
        names.inception.error: score_se,
        names.precision.key: precision,
        names.precision.error: proportion_se(precision, spec.num),
        names.recall.key: recall,
        names.recall.error: proportion_se(recall, len(real)),
        names.agreement.key: agreement,
        names.agreement.error: proportion_se(agreement, spec.num),
        **classifier.identity,
    }


def _measure(spec: Evaluate, samples: Samples, classifier: Classifier) -> dict[str, Any]:
    """Return what a manifest says of the measurement."""
    images = classifier.reference
    content = images.images.tobytes() + images.labels.tobytes()
    reference: dict[str, Any] = {
        "name": spec.data.name,
        "num_images": len(images),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if classifier.split:
        reference["split"] = classifier.split

    quantised = classifier.quantised
    return {
        "decoder": {"name": "none: pixels"},
        "quantiser": QUANTISER if quantised else "none",
        "image": {
            "size": spec.data.size * spec.data.fold,
            "format": "uint8" if quantised else "float32",
        },
        "labels": {"histogram_sha256": label_histogram(samples.labels), "order": "as drawn"},
        "extractor": {"sha256": classifier.identity["classifier_sha256"], "dtype": "fp32"},
        "reference": reference,
        "neighbours": {"k": NEIGHBOURS, "arithmetic": "float64", "num_reference": len(images)},
    }
