"""Everything that decides a score, as one hashed manifest. Standard library only.

A manifest has three parts. `model` is what was scored. `measure` is how it was scored; together
with the key of the weights, EMA or raw, it names the protocol. The hash is of both, and scores
compare only within one. `run` is what changes their rounding only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.engine.records.store import Record

Manifest = dict[str, Any]
UNKNOWN_FEATURES = "unknown Inception weights"  # name of an extractor that is not the published one
GUIDANCE_FORMULA = "null + scale (conditional - null)"
SEEDS = "one CPU generator an image, from (seed, index)"
# Balls of density and coverage before manifests named them.
FIRST_DENSITY_BALL = "closed"
# What a sampler writes of itself beside its images: keys of `measure` under the same names.
KEYS_OF_SAMPLES = ("data", "seed", "precision", "decoder", "quantiser", "nfe")


@dataclass(frozen=True)
class _SplitSampler:
    """The canonical form of a sampler in the parts that a manifest keeps apart."""

    # Fields of the sampler itself.
    own: dict[str, Any]
    # Formula, scale, channels and interval of guidance by the network.
    guidance: dict[str, Any]
    # Scale of guidance by a classifier.
    classifier_scale: float


def manifest(
    spec: dict[str, Any], model: dict[str, Any], measure: dict[str, Any], **run: Any
) -> Manifest:
    """Return what the spec declares, completed by what was found, with the hash.

    Args:
        spec: full canonical form of an Evaluate spec.
        model: what was found of the weights.
        measure: what was found of the measurement.
        run: what changes the rounding only.
    """
    return _complete(declared(spec), model, measure, run)


def declared(spec: dict[str, Any]) -> Manifest:
    """Return what the full canonical form of an Evaluate spec says by itself.

    Records that carry no manifest have no more than this.
    """
    train = spec["train"]
    sampler = _split_sampler(spec["sampler"])

    # The data's own fields tell flips and the kind of latents, which the name leaves open.
    model = _without_kind(train)
    model["data"] = _without_kind(train["data"])
    for network in ("classifier", "upsampler"):
        if spec.get(network):
            model[network] = spec[network]
    if spec.get("average") is not None:
        model["average"] = {"power_width": spec["average"]}

    guidance = dict(sampler.guidance)
    if spec.get("classifier"):
        guidance["classifier"] = "mean + scale variance gradient of log p(y | x_t)"
        guidance["classifier_scale"] = sampler.classifier_scale

    measure = {
        "data": train["data"]["name"],
        "sampler": sampler.own,
        "guidance": guidance,
        "labels": {"policy": spec["labels"]},
        "num": spec["num"],
        "seed": spec["seed"],
        "seeds": SEEDS,
        "precision": spec["precision"],
        "extractor": {"name": spec["features"]},
    }
    if spec.get("upsampler"):
        measure["upsampling"] = spec["upsampling"]
    return {"model": model, "measure": measure}


def samples_manifest(
    made: dict[str, Any], model: dict[str, Any], measure: dict[str, Any]
) -> Manifest:
    """Return the manifest of a file of samples.

    Args:
        made: what the sampler wrote of itself. What it does not say is not recorded.
        model: what was found of the file.
        measure: what was found of the measurement.
    """
    # How the images were sampled.
    said: dict[str, Any] = {key: made[key] for key in KEYS_OF_SAMPLES if key in made}
    said["extractor"] = {"name": "inception"}
    if isinstance(made.get("sampler"), dict):
        sampler = _split_sampler(made["sampler"])
        said["sampler"] = sampler.own
        said["guidance"] = sampler.guidance
    labels = _renamed(made, {"policy": "labels", "order": "order"})
    if labels:
        said["labels"] = labels

    # Which weights sampled them.
    weights = _renamed(made, {"weights_sha256": "network", "key": "key"})
    return _complete({"model": weights, "measure": said}, model, measure, {})


def record_manifest(record: Record) -> Manifest:
    """Return the manifest of an Evaluate record, or what an older record says of it."""
    if "manifest" in record.values:
        return with_defaults(record.values["manifest"])
    found: dict[str, Any] = {
        "flags": record.provenance.get("precision_flags", {}),
        "versions": {"torch": record.provenance.get("torch")},
    }
    if "classifier_sha256" in record.values:
        found["extractor"] = {"sha256": record.values["classifier_sha256"]}
    return with_defaults(manifest(record.spec, {}, found))


def has_unknown_features(values: dict[str, Any]) -> bool:
    """Return whether unknown weights gave a record's values, which then compare with no others."""
    measure = values.get("manifest", {}).get("measure", {})
    return measure.get("extractor", {}).get("name") == UNKNOWN_FEATURES


def with_defaults(whole: Manifest) -> Manifest:
    """Return the manifest with the fields that older ones left open.

    Density and coverage are scores on Inception's features alone. They were measured with closed
    balls until manifests named the ball.
    """
    measure = whole.get("measure", {})
    neighbours = measure.get("neighbours", {})
    if measure.get("extractor", {}).get("name") != "inception" or "density_ball" in neighbours:
        return whole
    neighbours = neighbours | {"density_ball": FIRST_DENSITY_BALL}
    return whole | {"measure": measure | {"neighbours": neighbours}}


def _split_sampler(sampler: dict[str, Any]) -> _SplitSampler:
    own = _without_kind(sampler)
    guidance = {"formula": GUIDANCE_FORMULA}
    for key in ("scale", "channels", "interval"):
        if key in own:
            guidance[key] = own.pop(key)
    classifier_scale = own.pop("classifier_scale", 0.0)
    return _SplitSampler(own, guidance, classifier_scale)


def _without_kind(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "kind"}


def _renamed(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Return the values that exist under new names; `keys` gives the old name of each."""
    return {new: values[old] for new, old in keys.items() if old in values}


def _complete(
    whole: Manifest, model: dict[str, Any], measure: dict[str, Any], run: dict[str, Any]
) -> Manifest:
    """Add what was found, field by field within the groups of `measure`, and the hash."""
    whole["model"] |= model
    for key, value in measure.items():
        if isinstance(value, dict):
            value = whole["measure"].get(key, {}) | value
        whole["measure"][key] = value

    # The hash names the protocol.
    protocol = {"measure": whole["measure"], "key": whole["model"].get("key")}
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    if run:
        whole["run"] = run
    whole["hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return whole
