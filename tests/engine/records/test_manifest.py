"""What decides a score: hashed, compared, and named with the size of its effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_FIXED
from experiments.engine.records.comparison import (
    Missing,
    clashes,
    fields_of_some,
    incomparable,
)
from experiments.engine.records.effects import EFFECTS, effect_of
from experiments.engine.records.manifest import (
    Manifest,
    declared,
    record_manifest,
    with_defaults,
)
from experiments.engine.records.score_names import FID, counted_name
from experiments.engine.records.store import Record
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Sampler, canonical
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1
from tests.support.manifests import SPEC, manifest_of, pairs

REFERENCE = REPOSITORY / "results" / "reference" / "evaluate"


def committed_files() -> list[Path]:
    return sorted(REFERENCE.glob("*.json"))


# ---- The hash


def test_the_hash_names_how_was_measured_and_not_what():
    first = manifest_of()

    # Neither other weights nor another network nor another seed of training change it.
    assert manifest_of(model={"weights_sha256": "2", "key": "ema"})["hash"] == first["hash"]
    other_network = evaluate_stage(TABLE_4.rows[1], IMAGENET256, 3)
    assert manifest_of(other_network)["hash"] == first["hash"]

    # Weights that are no average do.
    assert manifest_of(model={"weights_sha256": "1", "key": "raw"})["hash"] != first["hash"]


def test_what_changes_the_rounding_only_is_named_and_not_hashed():
    other = manifest_of(batch=100)
    assert other["hash"] == manifest_of()["hash"]
    assert pairs(manifest_of(), other) == [("run.batch", 250, 100)]


@pytest.mark.parametrize(
    "field, changed",
    [
        ("measure.num", dict(num=10_000)),
        ("measure.labels.policy", dict(labels="balanced")),
        ("measure.seed", dict(seed=1)),
        ("measure.precision", dict(precision="bf16")),
        ("measure.sampler.name", dict(sampler=Sampler(name="ddim"))),
        ("measure.sampler.num_steps", dict(sampler=Sampler(num_steps=50))),
        ("measure.guidance.scale", dict(sampler=Sampler(scale=1.4))),
        ("measure.guidance.channels", dict(sampler=Sampler(channels=4))),
        ("measure.guidance.interval", dict(sampler=Sampler(interval=(0, 500)))),
    ],
)
def test_every_declared_choice_changes_the_hash_and_is_named(field: str, changed: dict[str, Any]):
    other = manifest_of(replace(SPEC, **changed))
    assert other["hash"] != manifest_of()["hash"]
    assert [key for key, _, _ in pairs(manifest_of(), other)] == [field]
    assert incomparable(manifest_of(), other) == [field]
    assert effect_of(field).size


@pytest.mark.parametrize(
    "field, measure",
    [
        ("measure.extractor.sha256", dict(extractor={"sha256": "cd"})),
        ("measure.reference.sha256", dict(reference={"sha256": "ef"})),
        ("measure.decoder.sha256", dict(decoder={"sha256": "ef"})),
        ("measure.flags.cudnn_tf32", dict(flags={"matmul_tf32": False, "cudnn_tf32": True})),
        ("measure.versions.torch", dict(versions={"torch": "3"})),
        ("measure.quantiser", dict(quantiser="floor")),
        ("measure.labels.order", dict(labels={"order": "by class"})),
    ],
)
def test_everything_found_changes_the_hash_and_has_a_known_effect(
    field: str, measure: dict[str, Any]
):
    other = manifest_of(**measure)
    assert other["hash"] != manifest_of()["hash"]
    assert field in [key for key, _, _ in pairs(manifest_of(), other)]
    assert effect_of(field).size


# ---- What a model is


def test_how_latents_are_stored_is_recorded_beyond_the_name_of_the_data():
    other = manifest_of(evaluate_stage(TABLE_4.rows[0], IMAGENET256_FIXED, 0))
    assert pairs(manifest_of(), other) == [("model.data.latents", "moments", "fixed")]
    assert other["hash"] == manifest_of()["hash"]


def test_the_length_of_training_is_recorded_with_its_effect():
    shorter = replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, steps=80_000))
    other = manifest_of(evaluate_stage(TABLE_4.rows[0], shorter, 0))
    assert [key for key, _, _ in pairs(manifest_of(), other)] == ["model.recipe.steps"]
    assert effect_of("model.recipe.steps").size


def test_models_may_differ_and_their_scores_still_compare():
    other = manifest_of(evaluate_stage(TABLE_4.rows[1], IMAGENET256, 1))
    assert pairs(manifest_of(), other)
    assert not incomparable(manifest_of(), other)


def test_what_a_record_does_not_say_is_no_clash():
    bare = declared(canonical(SPEC, full=True))
    difference = ("measure.extractor.sha256", "ab", Missing.NOT_RECORDED)
    assert difference in pairs(manifest_of(), bare)
    assert not incomparable(manifest_of(), bare)


def declared_on_digits(row: Row) -> Manifest:
    return declared(canonical(evaluate_stage(row, DIGITS, 0), full=True))


def test_what_a_model_did_without_is_a_difference_and_no_gap():
    """A classifier that guides and an upsampler are one field each; ADM alone has neither."""
    whole = declared_on_digits(TABLE_1.row("ADM-U"))
    alone = declared_on_digits(TABLE_1.row("ADM-64"))
    del alone["model"]["init_from"]
    differing = {field: (a, b) for field, a, b in pairs(whole, alone)}
    assert not [values for values in differing.values() if Missing.NOT_RECORDED in values]
    assert "model.init_from" not in differing

    # The parts that one of them does without.
    assert differing["measure.guidance.classifier"] == (
        "mean + scale variance gradient of log p(y | x_t), scale 1.0",
        Missing.WITHOUT,
    )
    upsampling, without = differing["measure.upsampling"]
    assert "name ancestral, num_steps 50" in upsampling
    assert without == Missing.WITHOUT
    assert differing["model.upsampler"][1] == Missing.WITHOUT

    # The same from the other side, where both parts clash.
    assert {field: (b, a) for field, a, b in pairs(alone, whole)} == differing
    assert {"measure.guidance.classifier", "measure.upsampling"} <= set(incomparable(alone, whole))
    assert not incomparable(whole, whole)


def test_every_effect_has_its_source_and_reaches_a_field_of_a_manifest():
    """No effect is declared of a field that a manifest never has, and each has its size."""
    complete = manifest_of(
        reference={"crop": ""},
        decoder={"scale": 1.0},
        captions={"encoder": ""},
        selection="",
        neighbours={},
        image={},
        quantiser="",
        nfe=1,
        upsampling={},
        guidance={"classifier": ""},
        labels={"order": ""},
        extractor={"dinov2": {"resize": "", "positions": ""}},
    )

    # A manifest with all its fields.
    fields = {field for field, _, _ in pairs(complete, {})}
    for prefix, effect in EFFECTS.items():
        assert effect.size, prefix
        assert effect.source or prefix == "model", prefix
        assert any(field == prefix or field.startswith(f"{prefix}.") for field in fields), prefix


@pytest.mark.parametrize("num, name", [(50_000, "FID-50K"), (500, "FID-500"), (1500, "FID-1500")])
def test_a_score_carries_its_number_of_images(num: int, name: str):
    assert counted_name(FID, num) == name


# ---- Density


CLOSED = {"k": 3}
OPEN = {"k": 3, "density_ball": "open"}


def test_density_of_the_first_closed_balls_is_not_ranked_with_that_of_open_ones():
    old = manifest_of(neighbours=CLOSED)
    new = manifest_of(neighbours=OPEN)
    field = "measure.neighbours.density_ball"
    assert pairs(old, new) == [(field, "closed", "open")]
    assert incomparable(old, new) == [field]
    assert "density" in effect_of(field).size


def test_small_classifiers_have_no_density_and_no_balls():
    digits = manifest_of(replace(SPEC, features="digits"), neighbours=CLOSED)
    assert with_defaults(digits) == digits


def test_tables_rank_across_the_balls_of_density_which_they_do_not_show():
    def record_with(neighbours: dict[str, Any]) -> Record:
        values = {"manifest": manifest_of(neighbours=neighbours)}
        spec = canonical(SPEC, full=True)
        return Record("0" * 16, "evaluate", "done", values, {}, "", spec)

    old = record_with(CLOSED)
    new = record_with(OPEN)
    assert clashes([new], [old]) == []
    assert fields_of_some([old, new]) == []


# ---- Committed records


def test_older_records_say_what_they_can():
    """A record without a manifest still says its spec and what its values hold."""
    record = json.loads(committed_files()[0].read_text())
    record["values"].pop("manifest", None)
    record.pop("format")
    measure = record_manifest(Record(**record))["measure"]
    assert measure["num"] == 500
    assert measure["extractor"]["sha256"] == record["values"]["classifier_sha256"]


def test_every_committed_score_holds_what_decided_it():
    paths = committed_files()
    assert paths
    for path in paths:
        values = json.loads(path.read_text())["values"]
        assert "hash" in values.get("manifest", {}), path.name


def test_a_field_that_older_records_lack_leaves_them_comparable():
    """New scores on small classifiers name the reference's hash and the labels' order."""
    path = committed_files()[0]
    old = json.loads(path.read_text())["values"]["manifest"]
    new = json.loads(path.read_text())["values"]["manifest"]
    for part, key in (("reference", "sha256"), ("labels", "order")):
        old["measure"][part].pop(key, None)
        new["measure"][part][key] = "said"
    assert not incomparable(old, new)
    assert pairs(old, new) == [
        ("measure.labels.order", Missing.NOT_RECORDED, "said"),
        ("measure.reference.sha256", Missing.NOT_RECORDED, "said"),
    ]
