"""The Evaluate stage: sample images, score them, and say in a manifest what decided the scores."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray

from experiments.engine.data.captioned.folders import is_coco
from experiments.engine.data.captioned.pictures import describe_captions
from experiments.engine.data.image_files import (
    ImageFile,
    file_sha256,
    has_images,
    name_in_errors,
)
from experiments.engine.data.locate import inception_path, reference_path, require_features
from experiments.engine.data.pictures import Crop
from experiments.engine.data.quantise import to_uint8
from experiments.engine.data.sets import ImageSet, load
from experiments.engine.machine.cores import find_cores
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.manifest import manifest
from experiments.engine.records.score_names import DIGITS_TEXT
from experiments.engine.records.weight_files import require_unchanged
from experiments.engine.runtime.context import RunContext
from experiments.engine.sampling.networks import decoder_warnings
from experiments.engine.sampling.samples import (
    ORDER,
    QUANTISER,
    generate_samples,
    sampling_batch,
)
from experiments.engine.scoring.captioned.stage import score_captioned
from experiments.engine.scoring.classified import score_classified
from experiments.engine.scoring.inception import load_inception
from experiments.engine.scoring.measure import PIECE, Extractor, measure_shared
from experiments.engine.scoring.moments import moments_of
from experiments.engine.scoring.outcome import Scored, label_histogram, package_versions
from experiments.engine.scoring.reference import (
    Reference,
    check_features,
    check_reference,
    identify_measure,
    reference_of,
    require_crop,
)
from experiments.engine.scoring.scores import score
from experiments.engine.specs.spec import Checkpoint, Data, Evaluate, Train, canonical
from experiments.engine.training.averages import (
    describe_average,
    initial_share,
    warn_of_initial_share,
)

# Which of a training's checkpoints is scored, where papers choose the best one by its score.
SELECTION = "the last average"
# Images in ADM's file of each size, beside the statistics of all training images.
ADM_REFERENCE = 10_000


def run_evaluation(spec: Evaluate, cache: Path, context: RunContext) -> dict[str, Any]:
    """Sample with a training's EMA network and score the images.

    Every rank of the group samples its share of the batches. No number depends on the group, nor on
    a CPU on the batch that the resources name. A GPU can round by the batch, which the manifest
    names.

    Args:
        spec: what is scored.
        cache: folder of the classifiers that scores on small features need.
        context: of the run; its folder is that of the training.

    Returns:
        On the first rank, the scores with their standard errors, and the manifest. Other ranks
        return an empty dictionary.
    """
    require_features(spec)
    if isinstance(spec.train, Checkpoint) and context.resources.checkpoint:
        require_unchanged(context.resources.checkpoint, spec.train.sha256)
    if spec.features == "inception":
        scored = _score_inception(spec, context)
    elif spec.features == DIGITS_TEXT:
        scored = score_captioned(spec, cache, context)
    else:
        scored = score_classified(spec, cache, context)
    if scored is None:
        return {}

    # Weights that may not be averaged make another protocol.
    values = dict(scored.values)
    if scored.key != getattr(spec.train, "key", "ema"):
        warning = (
            f"the weights' key is {scored.key}, not ema: "
            "the file does not say whether they are averaged"
        )
        values["warnings"] = [*values.get("warnings", []), warning]

    # An average that is young still holds initial weights.
    if isinstance(spec.train, Train):
        values["initial_share"] = initial_share(spec.train.recipe, spec.average)
        noted = warn_of_initial_share(values["initial_share"])
        if noted:
            values["warnings"] = [*values.get("warnings", []), *noted]
        if spec.average is not None:
            values["average"] = describe_average(spec.train.recipe, spec.average)

    # The flags are read while they are set.
    with precision(spec.precision, context.device):
        flags = read_tf32_flags()
    cores = find_cores()
    values["manifest"] = manifest(
        canonical(spec, full=True),
        {"weights_sha256": scored.weights_sha256, "key": scored.key},
        scored.measure | {"flags": flags, "versions": _versions(spec), "nfe": scored.values["nfe"]},
        batch=scored.batch,
        cores={"number": cores.number, "decided_by": cores.decided_by, "limits": cores.limits},
    )
    return values


def _versions(spec: Evaluate) -> dict[str, str]:
    """Return the versions of the packages that bear on the scores."""
    samplers = [sampler for sampler in (spec.sampler, spec.upsampling) if sampler]
    by_diffusers = any(sampler.name.endswith("_diffusers") for sampler in samplers)
    packages = ["numpy", "scipy"]
    if spec.features == "inception":
        packages.append("torch-fidelity")
    if spec.features == "inception" or by_diffusers:
        packages.append("diffusers")
    return package_versions(*packages)


def _score_inception(spec: Evaluate, context: RunContext) -> Scored | None:
    """Score quantised images on Inception features; None on ranks but the first.

    The reference is ADM's file, or the set's own images if it is one of pixels.
    """
    # What the scores need is opened before hours of sampling.
    extractor = load_inception(inception_path(), context.device)
    require_reference(spec.data)

    # Features wait in a folder that names the weights and the extractor.
    samples = generate_samples(spec, context)
    name = f"measured-{samples.origin['network']}-{extractor.sha256[:16]}"
    parts = context.folder_of(spec) / name
    measured = measure_shared(extractor, samples, parts / "samples", context)
    reference = _measure_reference(spec.data, extractor, parts, context)
    if measured is None or reference is None:
        return None

    values = score(
        measured,
        reference,
        samples.labels,
        balanced=spec.labels == "balanced",
        device=context.device,
    )
    values["warnings"] += decoder_warnings(spec.data, samples.origin["decoder"])
    values["warnings"] += samples.origin.get("warnings", [])
    values["warnings"] += extractor.warnings
    values["nfe"] = samples.nfe
    shutil.rmtree(parts, ignore_errors=True)
    measure = {
        "decoder": samples.origin["decoder"],
        "quantiser": QUANTISER,
        "image": {"size": samples.shape[1], "format": "uint8"},
        "labels": {"histogram_sha256": label_histogram(samples.labels), "order": ORDER},
        **identify_measure(extractor, reference),
    }
    if is_coco(spec.data):
        measure |= {"captions": describe_captions(), "selection": SELECTION}
    return Scored(
        values,
        samples.origin["network"],
        samples.origin["key"],
        sampling_batch(context.device, context.resources.sample_batch),
        measure,
    )


class _GreyLevels:
    """The images of a set of pixels as grey levels, in the set's own order."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> ndarray:
        """Return images start to stop - 1, uint8 (stop - start, H, W, 3)."""
        pixels, _ = self.images.take(torch.arange(start, stop))  # (n, 3, H, W)
        return to_uint8(pixels).permute(0, 2, 3, 1).contiguous().numpy()

    def digest(self) -> str:
        """Return the SHA-256 of all grey levels."""
        total = hashlib.sha256()
        for start in range(0, len(self), PIECE):
            total.update(self.read(start, min(start + PIECE, len(self))).tobytes())
        return total.hexdigest()


def require_reference(data: Data) -> None:
    """Open what samples are scored against.

    Raises:
        ValueError: if it cannot be read; this is known before hours are spent on sampling.
    """
    path = reference_path(data)
    if path:
        check_reference(path)
    else:
        load(data)
    if path and is_coco(data):
        require_crop(path, Crop.SQUARE)


def _measure_reference(
    data: Data, extractor: Extractor, parts: Path, context: RunContext
) -> Reference | None:
    """Return what the samples are scored against; None on ranks but the first."""
    path = reference_path(data)
    if path:
        reference = _measure_file(path, extractor, parts, context)
        if reference and not is_coco(data):
            _warn_of_others(path, reference)
        return reference
    images = load(data)
    assert isinstance(images, ImageSet)
    return _measure_set(data.name, _GreyLevels(images), extractor, parts, context)


def _measure_file(
    path: Path, extractor: Extractor, parts: Path, context: RunContext
) -> Reference | None:
    """Return the reference in a file; None on ranks but the first."""
    with name_in_errors(path):
        check_features(path, extractor)
        # The ranks measure the images together, and the first one alone reads the statistics.
        measured = None
        if has_images(path):
            folder = parts / file_sha256(path)[:16]
            measured = measure_shared(extractor, ImageFile(path), folder, context)
        if not context.group.first:
            return None
        return reference_of(path, measured)


def _warn_of_others(path: Path, reference: Reference) -> None:
    """Note a warning if a file of a reference is not ADM's."""
    identity = reference.identity
    if identity["num_images"] != ADM_REFERENCE or not identity["statistics"]:
        reference.warnings.append(
            f"{path.name} is not ADM's reference, which holds statistics and {ADM_REFERENCE:,} "
            "images: FID against another one is another number"
        )


def _measure_set(
    name: str, images: _GreyLevels, extractor: Extractor, parts: Path, context: RunContext
) -> Reference | None:
    """Return the training images of a set as a reference."""
    sha256 = images.digest()
    measured = measure_shared(extractor, images, parts / sha256, context)
    if measured is None:
        return None

    # Such a reference has no statistics of its own and is named by the digest of its images.
    identity = {
        "name": f"{name}, training images",
        "sha256": sha256,
        "statistics": False,
        "num_images": len(images),
    }
    moments = {"pool": moments_of(measured.pool), "spatial": moments_of(measured.spatial)}
    return Reference(moments, measured.pool, identity, size=measured.size)
