"""Everything that decides a score, as one hashed manifest, and how two of them differ. Standard library only.

`model` is what was scored; `measure` is how, and names the protocol together with the key of the weights, EMA or raw: the hash is of
both, and scores compare only within one. `run` is what changes their rounding only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.engine.records.store import Record

NAMED = (
    "measure.decoder",
    "measure.extractor",
    "measure.reference",
)  # under another name these have other fields
ABSENT, WITHOUT = "not recorded", "without"
ONE_SIDED = (
    "measure.guidance.classifier",
    "measure.upsampling",
    "model.classifier",
    "model.upsampler",
    "model.init_from",
    "model.sha256",
)  # a manifest without one did without it

# How far a score moves where a field differs, by the longest prefix of its name. Sizes and sources as published.
EFFECTS: dict[str, tuple[str, str]] = {
    "measure.num": (
        "FID is biased by c / N: +2.75 at 10K against 50K where FID-50K is 9.3, +3.0 where it is 3.0; recall rises too",
        "baofff/U-ViT#14, facebookresearch/DiT#94",
    ),
    "measure.guidance.scale": (
        "2.27 at 1.5 against 9.6 without, DiT-XL/2; a scale of 0.4 in U-ViT's formula is 1.4 here",
        "facebookresearch/DiT#8, baofff/U-ViT#14",
    ),
    "measure.guidance.channels": (
        "three of four channels at scale 1 + x are about four at 1 + 0.75 x: FID 2.27 at 1.5, 2.23 at 1.375",
        "facebookresearch/DiT PR#12",
    ),
    "measure.guidance.interval": ("FID 1.45 against 1.35 at low FID", "LightningDiT#37, #88"),
    "measure.guidance.classifier": (
        "10.94 without, 4.59 with a classifier that guides (ADM at 256)",
        "arXiv:2105.05233",
    ),
    "measure.upsampling": (
        "4.59 by one guided network, 3.94 by a smaller one and an upsampler (ADM at 256); 7.72 and 3.85 at 512",
        "openai/guided-diffusion README",
    ),
    "measure.sampler": (
        "ODE 9.5 against SDE 8.3 (SiT-XL, unguided), 34.7 to 36.5 against 33.0 (B/2); eta 0 against 1: 3.31 against 3.54 (LDM)",
        "willisma/SiT#31, CompVis/latent-diffusion#262",
    ),
    "measure.nfe": ("counted network evaluations, not steps: see the sampler", "willisma/SiT#31"),
    "measure.labels.policy": (
        "balanced labels lower FID-50K by about 0.1 (in simulation: 12 % of the bias, 25 to 35 % of the deviation)",
        "RAE README; a simulated mixture of 100 classes",
    ),
    "measure.labels.order": (
        "IS over blocks of 5000 collapses where a class follows itself (2.84 against 9.42); of whole sets nothing else changes",
        "a simulated file in ADM's evaluator",
    ),
    "measure.labels": ("as the label policy: about 0.1 of FID-50K at most", "RAE README"),
    "measure.seed": (
        "a coefficient of variation of about 0.4 %: 0.01 at FID 2, 0.2 at FID 50",
        "arXiv:2606.20536",
    ),
    "measure.precision": (
        "fp32 torch 2.21 against 2.27 in JAX (DiT); bf16 1.26 against 1.13 (RAE)",
        "facebookresearch/DiT README, RAE#50",
    ),
    "measure.flags": ("as precision: hundredths of FID", "facebookresearch/DiT README"),
    "measure.decoder": (
        "ft-mse 2.30 against ft-ema 2.27, original 2.46; a wrong normalisation costs tens of FID",
        "DiT appendix, LightningDiT#34",
    ),
    "measure.quantiser": (
        "truncating 255 (x + 1) / 2 lowers the mean by 0.49 grey levels and changes 49 % of the pixels",
        "computed for every level",
    ),
    "measure.image": (
        "resizing twice or JPEG changes FID by several units on some sets",
        "arXiv:2104.11222",
    ),
    "measure.extractor": (
        "another Inception (torchvision's, JAX's) gives incomparable FIDs: 13.7 against 53.7; the digits' classifier trained under four instruction sets, fd_digits of 12.6 to 12.9 for one set of images",
        "pytorch/torcheval#192; measured by ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY",
    ),
    "measure.reference": (
        "another reference: 7.03 where the paper has 1.26; validation against training images, 7.6",
        "MCG-NJU/DDT#7, guided-diffusion#14",
    ),
    "measure.neighbours": (
        "ADM's half precision raises precision by 0.0005 to 0.0015 and recall by 0.001 to 0.003; both depend on the two counts",
        "ADM README against ADM-evaluation-suite-pytorch",
    ),
    "measure.versions": (
        "below the sampling error, as far as known; FID at d = 2048 agrees to 1e-5 between root algorithms",
        "computed against scipy's sqrtm",
    ),
    "run.batch": (
        "rounding: each image has its own seed here; where seeds follow processes and batches, 1.34 on 16 GPUs against 1.39 on 4",
        "tzco/Diffusion-wo-CFG#2",
    ),
    "model.key": ("EMA against raw weights: 6.06 against 8.1", "MeanFlow#12"),
    "model.seed": (
        "another training: a coefficient of variation of 1 to 2 %, 0.03 at FID 2.05, 0.65 at 50",
        "arXiv:2606.20536",
    ),
    "model.recipe": (
        "steps, batch or learning rate: 79.6 where 68.4 is published (DiT-S/2), 167.5 against 153.6 (S/8)",
        "facebookresearch/DiT#122, #21",
    ),
    "model.data.flip": ("said to be negligible", "REPA#19"),
    "model": ("another model: this is the difference under study", ""),
}


def declared(spec: dict[str, Any]) -> dict[str, Any]:
    """What a full canonical Evaluate spec alone says: also for records that carry no manifest."""
    train, parts = (
        spec["train"],
        {key: spec[key] for key in ("classifier", "upsampler") if spec.get(key)},
    )
    sampler, guidance, classifier_scale = _guided(spec["sampler"])
    if "classifier" in parts:
        guidance |= {
            "classifier": "mean + scale variance gradient of log p(y | x_t)",
            "classifier_scale": classifier_scale,
        }
    seen = {
        key: value for key, value in train["data"].items() if key != "kind"
    }  # flips and latents too, which its name leaves open
    model = {key: train[key] for key in train if key != "kind"} | {"data": seen} | parts
    measure = {
        "data": train["data"]["name"],
        "sampler": sampler,
        "guidance": guidance,
        "labels": {"policy": spec["labels"]},
        "num": spec["num"],
        "seed": spec["seed"],
        "seeds": "one CPU generator an image, from (seed, index)",
        "precision": spec["precision"],
        "extractor": {"name": spec["features"]},
    } | ({"upsampling": spec["upsampling"]} if "upsampler" in parts else {})
    return {"model": model, "measure": measure}


def _guided(sampler: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float]:
    """A canonical sampler's own fields, its guidance, and the scale of a classifier's."""
    own = {key: value for key, value in sampler.items() if key != "kind"}
    guidance = {"formula": "null + scale (conditional - null)"} | {
        key: own.pop(key) for key in ("scale", "channels", "interval") if key in own
    }
    return own, guidance, own.pop("classifier_scale", 0.0)


def manifest(
    spec: dict[str, Any], model: dict[str, Any], measure: dict[str, Any], **run: Any
) -> dict[str, Any]:
    """The declared part completed by what was found, with the hash."""
    return _completed(declared(spec), model, measure, run)


def of_samples(
    made: dict[str, Any], model: dict[str, Any], measure: dict[str, Any]
) -> dict[str, Any]:
    """The same of a file of samples, whose `made` says what its sampler declared; what it does not say is not recorded."""
    said = {
        key: made[key]
        for key in ("data", "seed", "precision", "decoder", "quantiser", "nfe")
        if key in made
    } | {"extractor": {"name": "inception"}}
    if isinstance(made.get("sampler"), dict):
        said["sampler"], said["guidance"], _ = _guided(made["sampler"])
    if labels := {
        name: made[key] for name, key in (("policy", "labels"), ("order", "order")) if key in made
    }:
        said["labels"] = labels
    weights = {
        name: made[key]
        for name, key in (("weights_sha256", "network"), ("key", "key"))
        if key in made
    }
    return _completed({"model": weights, "measure": said}, model, measure, {})


def _completed(
    whole: dict[str, Any], model: dict[str, Any], measure: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    whole["model"] |= model
    for key, value in measure.items():
        whole["measure"][key] = (
            whole["measure"].get(key, {}) | value if isinstance(value, dict) else value
        )
    text = json.dumps(
        {"measure": whole["measure"], "key": whole["model"].get("key")},
        sort_keys=True,
        separators=(",", ":"),
    )
    return (
        whole
        | ({"run": run} if run else {})
        | {"hash": hashlib.sha256(text.encode()).hexdigest()[:16]}
    )


def of_record(
    spec: dict[str, Any], values: dict[str, Any], provenance: dict[str, Any]
) -> dict[str, Any]:
    """An Evaluate record's manifest, or what an older record says of it."""
    if "manifest" in values:
        return values["manifest"]
    found: dict[str, Any] = {
        "flags": provenance.get("precision_flags", {}),
        "versions": {"torch": provenance.get("torch")},
    }
    if "classifier_sha256" in values:
        found["extractor"] = {"sha256": values["classifier_sha256"]}
    return manifest(spec, {}, found)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, a's value, b's value) for every field that is not equal. Where only one manifest has a field the other's value is ABSENT;

    a part of ONE_SIDED is one field then, and the other's value is WITHOUT.
    """
    left, right = (
        {
            key: value
            for key, value in _flat(side)
            if key != "hash" and (key not in ONE_SIDED or value is not None)
        }
        for side in (a, b)
    )
    for part in ONE_SIDED:
        for side, other in ((left, right), (right, left)):
            own = [key for key in side if key.startswith(part)]
            if own and not any(key.startswith(part) for key in other):
                side[part] = ", ".join(
                    f"{key.removeprefix(part).lstrip('._')} {side.pop(key)}".strip() for key in own
                )
                other[part] = WITHOUT
    return [
        (key, left.get(key, ABSENT), right.get(key, ABSENT))
        for key in dict.fromkeys([*left, *right])
        if left.get(key, ABSENT) != right.get(key, ABSENT)
    ]


def incomparable(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Fields of `measure`, and the key of the weights, in which two manifests are known to differ: scores under them must not be ranked.

    The count of evaluations follows from the sampler, and under an adaptive one from the network.
    """
    return [
        key
        for key, *values in differences(a, b)
        if key.startswith(("measure.", "model.key"))
        and key != "measure.nfe"
        and ABSENT not in values
    ]


def clashes(records: Sequence[Record], base: Sequence[Record]) -> list[str]:
    """Fields, without `measure.`, in which any record is known to differ from the first of `base`; none where that is empty."""
    first = [of_record(record.spec, record.values, record.provenance) for record in base[:1]]
    found = (
        field
        for record in records
        for one in first
        for field in incomparable(one, of_record(record.spec, record.values, record.provenance))
    )
    return sorted({field.removeprefix("measure.") for field in found})


def not_recorded(records: Sequence[Record]) -> list[str]:
    """A sentence on the fields, without `measure.`, that were found for some of the records' manifests and for others not: there they count as agreeing.

    What the specs declare all of them hold.
    """
    manifests, held = (
        [of_record(record.spec, record.values, record.provenance) for record in records],
        [],
    )
    other = tuple(
        f"{part.removeprefix('measure.')}."
        for part in NAMED
        if len(
            {
                found["measure"].get(part.removeprefix("measure."), {}).get("name")
                for found in manifests
            }
        )
        > 1
    )
    for record, found in zip(records, manifests, strict=True):
        held.append(
            {key for key, _ in _flat(found["measure"])}
            - {key for key, _ in _flat(declared(record.spec)["measure"])}
            | {"model.key"} & {f"model.{key}" for key in found["model"]}
        )
    fields = sorted(
        key
        for key in set().union(*held)
        if not key.startswith(other) and not all(key in keys for keys in held)
    )
    return [f"not recorded by all, and taken as agreeing: {', '.join(fields)}."] * bool(fields)


def machines(features: str) -> tuple[str, ...]:
    """How the fields begin that differ from machine to machine: a reproduction is compared across them. A classifier of the suite's is trained on each."""
    return ("versions.",) if features == "inception" else ("versions.", "extractor.sha256")


def effect(key: str) -> tuple[str, str]:
    """Known size of the effect of a field and its source; empty where none is known."""
    prefixes = [prefix for prefix in EFFECTS if key == prefix or key.startswith(f"{prefix}.")]
    return EFFECTS[max(prefixes, key=len)] if prefixes else ("", "")


def score_name(name: str, num: int) -> str:
    """A score's printed name with its N: ('fid', 50000) -> 'FID-50K', ('fid_corrected', 50000) -> 'FID-50K, no bias'."""
    name, corrected, _ = name.partition("_corrected")
    words = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "mind": "MIND"}
    return f"{words.get(name, name)}-{f'{num // 1000}K' if num >= 1000 and num % 1000 == 0 else num}{', no bias' * bool(corrected)}"


def _flat(part: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in part.items():
        found += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else [(f"{prefix}{key}", value)]
        )
    return found
