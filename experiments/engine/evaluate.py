"""The Evaluate stage: images drawn, scored, and everything that decided the scores."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.engine import inception, metrics, scores
from experiments.engine.data import load
from experiments.engine.distributed import ALONE, Group
from experiments.engine.features import digits_classifier, extract
from experiments.engine.generate import Counted, images
from experiments.engine.heartbeat import Heartbeat
from experiments.engine.manifest import manifest
from experiments.engine.neighbours import precision_recall
from experiments.engine.precision import flags, precision
from experiments.engine.quantise import to_uint8
from experiments.engine.samples import QUANTISER, network_of, sampled
from experiments.engine.sharding import results
from experiments.engine.sources import inception_path, reference_path, require_features
from experiments.engine.spec import Data, Evaluate, canonical, spec_id
from experiments.engine.train import Resources, digest

Report = Callable[[int, int, float, float], None]


def run(spec: Evaluate, folder: Path, cache: Path, resources: Resources, group: Group = ALONE, beat: Heartbeat | None = None,
        report: Report = lambda *progress: None) -> dict[str, Any]:
    """Sample with the run's EMA network and score: floats with their standard errors beside them, and the manifest.

    folder: of the network's run; cache: of the digits classifier; `report(done, num, nan, images per second)`. Every rank
    of the group samples its share of the batches, cut as one process would cut them, so that no number depends on the
    group; the first rank scores, the others return {}.
    """
    require_features(spec)
    if spec.features == "digits":
        values, found = _digits(spec, folder, cache, resources, group, beat)
    else:
        values, found = _inception(spec, folder, resources, group, beat, report)
    if not group.first:
        return {}
    with precision(spec.precision, torch.device(resources.device)):
        used = ("numpy", "scipy", "torch-fidelity", "diffusers")[: 2 if spec.features == "digits" else 4]
        found |= {"flags": flags(), "versions": {"torch": torch.__version__} | _versions(*used)}
    model = {"weights_sha256": found.pop("network"), "key": "ema"}
    return values | {"manifest": manifest(canonical(spec, full=True), model, found | {"nfe": values["nfe"]})}


def _digits(spec: Evaluate, folder: Path, cache: Path, resources: Resources, group: Group, beat: Heartbeat | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores on the digits classifier's features, of images that are not quantised.

    Errors: influence function for fd_digits, delete-a-block jackknife for is_digits, binomial for the shares.
    """
    device, size = torch.device(resources.device), resources.sample_batch
    reference = load(spec.data)
    classifier, identity = digits_classifier(reference, cache)
    network = network_of(spec, folder, resources)

    def scored(piece: int) -> dict[str, np.ndarray]:
        counted = Counted(network)
        ((x, y),) = images(spec, counted, device, size, range(piece * size, min((piece + 1) * size, spec.num)))
        features, probabilities = extract(classifier, x)
        return {"features": features, "probabilities": probabilities, "labels": y.numpy(), "evaluated": np.array(counted.evaluated)}

    parts = folder / f"samples-{spec_id(spec)}-{size}-{digest(network)}"
    found = list(results(group, parts, math.ceil(spec.num / size), scored, beat))
    if not group.first:
        return {}, {}
    moments = metrics.Moments(found[0]["features"].shape[1])
    for part in found:
        moments.update(part["features"])
    fake, y, p = (np.concatenate([part[name] for part in found]) for name in ("features", "labels", "probabilities"))
    real, _ = extract(classifier, reference.take(torch.arange(len(reference)))[0])
    real_moments = metrics.Moments(real.shape[1])
    real_moments.update(real)
    precision, recall = precision_recall(real, fake)
    agreement = float((p.argmax(1) == y).mean())
    score, score_se = metrics.inception_score(p)
    values = {
        "num": spec.num,
        "nfe": sum(int(part["evaluated"]) for part in found) / spec.num,
        "fd_digits": metrics.frechet(moments, real_moments),
        "fd_digits_se": metrics.frechet_se(fake, moments, real_moments, y if spec.labels == "balanced" else None),
        "is_digits": score,
        "is_digits_se": score_se,
        "precision_digits": precision,
        "precision_digits_se": metrics.proportion_se(precision, len(fake)),
        "recall_digits": recall,
        "recall_digits_se": metrics.proportion_se(recall, len(real)),
        "agreement": agreement,
        "agreement_se": metrics.proportion_se(agreement, len(fake)),
        **identity,
    }
    shutil.rmtree(parts, ignore_errors=True)
    return values, {
        "network": digest(network),
        "decoder": {"name": "none: pixels"},
        "quantiser": "none",
        "image": {"size": spec.data.size, "format": "float32"},
        "labels": {"histogram_sha256": _histogram(y, spec.data.num_classes)},
        "extractor": {"sha256": identity["classifier_sha256"], "dtype": "fp32"},
        "reference": {"name": spec.data.name, "num_images": len(reference)},
        "neighbours": {"k": 3, "arithmetic": "float64", "num_reference": len(real)},
    }


def _inception(spec: Evaluate, folder: Path, resources: Resources, group: Group, beat: Heartbeat | None, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of quantised images on Inception features, against ADM's reference file or a pixel set's own images."""
    device = torch.device(resources.device)
    extractor = inception.load(inception_path(), device)
    samples = sampled(spec, folder, resources, report, group, beat)
    if samples is None:
        return {}, {}
    reference = _reference(spec.data, extractor)
    measured = scores.measure(extractor, samples.batches())
    values = scores.score(measured, reference, samples.labels, balanced=spec.labels == "balanced", device=device)
    return values | {"nfe": samples.nfe}, {
        "network": samples.made["network"],
        "decoder": samples.made["decoder"],
        "quantiser": QUANTISER,
        "image": {"size": samples.shape[1], "format": "uint8"},
        "labels": {"histogram_sha256": _histogram(samples.labels, spec.data.num_classes)},
        **scores.identity(extractor, reference),
    }


def _reference(data: Data, extractor: inception.Inception) -> scores.Reference:
    if path := reference_path(data):
        return scores.read_reference(extractor, path)
    digest, real = hashlib.sha256(), load(data)

    def batches() -> Iterator[ndarray]:
        for part in torch.arange(len(real)).split(inception.BATCH):
            batch = to_uint8(real.take(part)[0]).permute(0, 2, 3, 1).contiguous().numpy()
            digest.update(batch.tobytes())
            yield batch

    measured = scores.measure(extractor, batches())
    moments = {layer: scores.blocks_sum(getattr(measured, layer)) for layer in ("pool", "spatial")}
    named = {"name": f"{data.name}, training images", "sha256": digest.hexdigest(), "statistics": False, "num_images": len(real)}
    return scores.Reference(moments, measured.pool, named)


def _histogram(labels: ndarray, num_classes: int) -> str:
    return hashlib.sha256(np.bincount(labels, minlength=num_classes).astype("<i8").tobytes()).hexdigest()[:16]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
