"""The Evaluate stage: images drawn, scored, and everything that decided the scores."""

from __future__ import annotations

import hashlib
import math
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.engine.data.image_files import ImageFile, file_sha256, has_images, name_in_errors
from experiments.engine.data.locate import inception_path, reference_path, require_features
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import ImageSet, load_cifar10, load_data
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.numerics.weights import digest
from experiments.engine.records.manifest import manifest
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import compute_pieces
from experiments.engine.sampling.generate import CountingModel, can_capture_steps, generate_images
from experiments.engine.sampling.samples import (
    ORDER,
    QUANTISER,
    decoder_warnings,
    generate_samples,
    load_networks,
    sampling_batch,
)
from experiments.engine.scoring import inception, metrics, scores
from experiments.engine.scoring.features import cifar_classifier, digits_classifier, extract
from experiments.engine.scoring.measure import PIECE, blocks_sum, measure_shared
from experiments.engine.scoring.neighbours import precision_recall
from experiments.engine.scoring.reference import Reference, check_reference, identity, reference_of
from experiments.engine.specs.spec import Data, Evaluate, canonical, spec_id

ADM_REFERENCE = (
    10_000  # images in the file of each size, beside the statistics of all training images
)
ON_CPU = 250  # images that are drawn and classified at a time whatever is asked: both round by the batch there


def run(spec: Evaluate, cache: Path, context: RunContext) -> dict[str, Any]:
    """Sample with the run's EMA network and score: floats with their standard errors beside them, and the manifest.

    The context's folder is that of the network's run; cache: of the classifiers. Every rank of the group samples its
    share of the batches, cut as one process would cut them, so that no number depends on the
    group, nor on a CPU on the batch that is asked for; a GPU may round by it, and the manifest says it. The first rank scores, the
    others return {}.
    """
    require_features(spec)
    if spec.features == "inception":
        values, found = _inception(spec, context)
    else:
        values, found = _classified(spec, cache, context)
    if not context.group.first:
        return {}
    with precision(spec.precision, context.device):
        scored, by_diffusers = (
            spec.features == "inception",
            any(
                sampler.name.endswith("_diffusers")
                for sampler in (spec.sampler, spec.upsampling)
                if sampler
            ),
        )
        found |= {
            "flags": read_tf32_flags(),
            "versions": versions(
                "numpy",
                "scipy",
                *["torch-fidelity"] * scored,
                *["diffusers"] * (scored or by_diffusers),
            ),
        }
    model, batch = (
        {"weights_sha256": found.pop("network"), "key": found.pop("key")},
        found.pop("batch"),
    )
    if model["key"] != getattr(spec.train, "key", "ema"):
        values["warnings"] = [
            *values.get("warnings", []),
            f"the weights' key is {model['key']}, not ema: the file does not say whether they are averaged",
        ]
    return values | {
        "manifest": manifest(
            canonical(spec, full=True), model, found | {"nfe": values["nfe"]}, batch=batch
        )
    }


def _classified(
    spec: Evaluate, cache: Path, context: RunContext
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores on a small classifier's features, named by it: of digits against all digits, of quantised images against CIFAR-10's test images.

    Errors: influence function for fd, delete-a-block jackknife for is, binomial for the shares.
    """
    resources = context.resources
    device, on_digits = context.device, spec.features == "digits"
    size = ON_CPU if device.type == "cpu" else resources.sample_batch
    if on_digits:
        reference = load_data(spec.data)
        classifier, identity = digits_classifier(reference, cache)
    else:
        reference = load_cifar10(spec.data, "test")
        classifier, identity = cifar_classifier(spec.data, reference, cache)
    network, key = load_networks(spec, context.folder, resources)
    counted = CountingModel(network, resources.graphs and can_capture_steps(spec))

    def scored(piece: int) -> dict[str, np.ndarray]:
        before = counted.evaluated
        ((x, y),) = generate_images(
            spec, counted, device, size, range(piece * size, min((piece + 1) * size, spec.num))
        )
        features, probabilities = extract(classifier, x if on_digits else from_uint8(to_uint8(x)))
        return {
            "features": features,
            "probabilities": probabilities,
            "labels": y.numpy(),
            "evaluated": np.array(counted.evaluated - before),
        }

    parts = context.folder / f"samples-{spec_id(spec)}-{size}-{digest(network)}"
    found = list(compute_pieces(context, parts, math.ceil(spec.num / size), scored))
    counted.forget()
    if not context.group.first:
        return {}, {}
    moments = metrics.Moments(found[0]["features"].shape[1])
    for part in found:
        moments.update(part["features"])
    fake, y, p = (
        np.concatenate([part[name] for part in found])
        for name in ("features", "labels", "probabilities")
    )
    real, _ = extract(classifier, reference.take(torch.arange(len(reference)))[0])
    real_moments = metrics.Moments(real.shape[1])
    real_moments.update(real)
    precision, recall = precision_recall(real, fake, device=device)
    agreement = float((p.argmax(1) == y).mean())
    score, score_se = metrics.inception_score(p)
    values = {
        "fd": metrics.frechet(moments, real_moments),
        "fd_se": metrics.frechet_se(
            fake, moments, real_moments, y if spec.labels == "balanced" else None
        ),
        "is": score,
        "is_se": score_se,
        "precision": precision,
        "precision_se": metrics.proportion_se(precision, len(fake)),
        "recall": recall,
        "recall_se": metrics.proportion_se(recall, len(real)),
    }
    named = {
        f"{name.removesuffix('_se')}_{spec.features}{'_se' if name.endswith('_se') else ''}": value
        for name, value in values.items()
    }
    shutil.rmtree(parts, ignore_errors=True)
    return {
        "num": spec.num,
        "nfe": sum(int(part["evaluated"]) for part in found) / spec.num,
        **named,
        "agreement": agreement,
        "agreement_se": metrics.proportion_se(agreement, len(fake)),
        **identity,
    }, {
        "network": digest(network),
        "key": key,
        "batch": size,
        "decoder": {"name": "none: pixels"},
        "quantiser": "none" if on_digits else QUANTISER,
        "image": {"size": spec.data.size, "format": "float32" if on_digits else "uint8"},
        "labels": {"histogram_sha256": histogram(y), "order": "as drawn"},
        "extractor": {"sha256": identity["classifier_sha256"], "dtype": "fp32"},
        "reference": {
            "name": spec.data.name,
            "num_images": len(reference),
            "sha256": hashlib.sha256(
                reference.images.tobytes() + reference.labels.tobytes()
            ).hexdigest(),
        }
        | ({} if on_digits else {"split": "test"}),
        "neighbours": {"k": 3, "arithmetic": "float64", "num_reference": len(real)},
    }


def _inception(spec: Evaluate, context: RunContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of quantised images on Inception features, against ADM's reference file or a pixel set's own images."""
    device = context.device
    extractor = inception.load(inception_path(), device)
    require_reference(spec.data)
    samples = generate_samples(spec, context)
    parts = context.folder_of(spec) / f"measured-{samples.made['network']}-{extractor.sha256[:16]}"
    measured = measure_shared(extractor, samples, parts / "samples", context)
    reference = _reference(spec.data, extractor, parts, context)
    if measured is None or reference is None:
        return {}, {}
    values = scores.score(
        measured, reference, samples.labels, balanced=spec.labels == "balanced", device=device
    )
    values["warnings"] += decoder_warnings(spec.data, samples.made["decoder"])
    shutil.rmtree(parts, ignore_errors=True)
    return values | {"nfe": samples.nfe}, {
        "network": samples.made["network"],
        "key": samples.made["key"],
        "batch": sampling_batch(device, context.resources.sample_batch),
        "decoder": samples.made["decoder"],
        "quantiser": QUANTISER,
        "image": {"size": samples.shape[1], "format": "uint8"},
        "labels": {"histogram_sha256": histogram(samples.labels), "order": ORDER},
        **identity(extractor, reference),
    }


class _Pixels:
    """A set of pixels as grey levels, in its own order."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> ndarray:
        return (
            to_uint8(self.images.take(torch.arange(start, stop))[0])
            .permute(0, 2, 3, 1)
            .contiguous()
            .numpy()
        )


def require_reference(data: Data) -> None:
    """ValueError in one line where what samples are scored against is not to be read: known before hours are spent on drawing."""
    if path := reference_path(data):
        check_reference(path)
    else:
        load_data(data)


def _reference(
    data: Data, extractor: inception.Inception, parts: Path, context: RunContext
) -> Reference | None:
    """What the samples are scored against; None on all ranks but the first."""
    if path := reference_path(data):
        with name_in_errors(path):
            measured = (
                measure_shared(extractor, ImageFile(path), parts / file_sha256(path)[:16], context)
                if has_images(path)
                else None
            )
            if not context.group.first:
                return None
            reference = reference_of(path, measured)
        if (
            reference.identity["num_images"] != ADM_REFERENCE
            or not reference.identity["statistics"]
        ):
            reference.warnings.append(
                f"{path.name} is not ADM's reference, which holds statistics and {ADM_REFERENCE:,} images: FID against another one is another number"
            )
        return reference
    real, total = _Pixels(load_data(data)), hashlib.sha256()
    for start in range(0, len(real), PIECE):
        total.update(real.part(start, min(start + PIECE, len(real))).tobytes())
    measured = measure_shared(extractor, real, parts / total.hexdigest()[:16], context)
    if measured is None:
        return None
    moments = {layer: blocks_sum(getattr(measured, layer)) for layer in ("pool", "spatial")}
    named = {
        "name": f"{data.name}, training images",
        "sha256": total.hexdigest(),
        "statistics": False,
        "num_images": len(real),
    }
    return Reference(moments, measured.pool, named, size=measured.size)


def histogram(labels: ndarray) -> str:
    """A short hash of the classes that occur and how often."""
    return hashlib.sha256(
        np.stack(np.unique(labels, return_counts=True)).astype("<i8").tobytes()
    ).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Of torch and of those of these packages that are installed."""
    found = {"torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
