"""What decides a score: hashed, compared, and named with the size of its effect."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_FIXED
from experiments.engine.records.comparison import (
    Missing,
    clashes,
    differences,
    fields_of_some,
    incomparable,
)
from experiments.engine.records.effects import EFFECTS, effect_of
from experiments.engine.records.manifest import (
    declared,
    manifest,
    record_manifest,
    with_defaults,
)
from experiments.engine.records.score_names import FID, counted_name
from experiments.engine.records.store import Record, Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.comparison import comparison_sheet
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Sampler, canonical
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1
from tests.support.sheets import note_about, note_texts, texts

SPEC = evaluate_stage(TABLE_4.rows[0], IMAGENET256, 0)
FOUND = {
    "extractor": {"sha256": "ab"},
    "flags": {"matmul_tf32": False, "cudnn_tf32": False},
    "versions": {"torch": "2"},
}
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "2", "dirty": False, "seconds": 1.0}


def pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The differences of two manifests as (field, value of a, value of b)."""
    return [(one.field, one.a, one.b) for one in differences(a, b)]


def made(
    spec: Any = SPEC, model: dict[str, Any] | None = None, batch: int = 250, **found: Any
) -> dict[str, Any]:
    return manifest(
        canonical(spec, full=True),
        model or {"weights_sha256": "1", "key": "ema"},
        FOUND | found,
        batch=batch,
    )


def test_the_hash_names_how_was_measured_and_not_what():
    assert made()["hash"] == made(batch=100)["hash"]
    assert pairs(made(), made(batch=100)) == [("run.batch", 250, 100)]
    assert (
        made()["hash"]
        == made(model={"weights_sha256": "2", "key": "ema"})["hash"]
        != made(model={"weights_sha256": "1", "key": "raw"})["hash"]
    )
    assert made()["hash"] == made(evaluate_stage(TABLE_4.rows[1], IMAGENET256, 3))["hash"]


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
    other = made(replace(SPEC, **changed))
    assert other["hash"] != made()["hash"]
    assert [key for key, _, _ in pairs(made(), other)] == [field] == incomparable(made(), other)
    assert effect_of(field).size


@pytest.mark.parametrize(
    "field, found",
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
def test_everything_found_changes_the_hash_and_has_a_known_effect_of(
    field: str, found: dict[str, Any]
):
    assert made(**found)["hash"] != made()["hash"]
    assert field in [key for key, _, _ in pairs(made(), made(**found))]
    assert effect_of(field).size


def test_what_the_networks_saw_is_recorded_beyond_its_name():
    other = made(evaluate_stage(TABLE_4.rows[0], IMAGENET256_FIXED, 0))
    assert pairs(made(), other) == [("model.data.latents", "moments", "fixed")]
    assert other["hash"] == made()["hash"]
    longer = made(
        evaluate_stage(
            TABLE_4.rows[0],
            replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, steps=80_000)),
            0,
        )
    )
    assert [key for key, _, _ in pairs(made(), longer)] == ["model.recipe.steps"]
    assert effect_of("model.recipe.steps").size


def test_a_model_may_differ_and_what_one_does_not_record_is_no_clash():
    other = made(evaluate_stage(TABLE_4.rows[1], IMAGENET256, 1))
    assert pairs(made(), other)
    assert not incomparable(made(), other)
    bare = declared(canonical(SPEC, full=True))
    assert ("measure.extractor.sha256", "ab", Missing.NOT_RECORDED) in pairs(made(), bare)
    assert not incomparable(made(), bare)


def test_what_a_model_did_without_is_a_difference_and_no_gap():
    """A classifier that guides and an upsampler are one field each; ADM alone has neither."""
    whole, alone = (
        declared(canonical(evaluate_stage(row, DIGITS, 0), full=True))
        for row in (TABLE_1.row("ADM-U"), TABLE_1.row("ADM-64"))
    )
    del alone["model"]["init_from"]
    found = {key: values for key, *values in pairs(whole, alone)}
    assert not [values for values in found.values() if Missing.NOT_RECORDED in values]
    assert "model.init_from" not in found
    assert found["measure.guidance.classifier"] == [
        "mean + scale variance gradient of log p(y | x_t), scale 1.0",
        Missing.WITHOUT,
    ]
    assert "name ancestral, num_steps 50" in found["measure.upsampling"][0]
    assert found["measure.upsampling"][1] == found["model.upsampler"][1] == Missing.WITHOUT
    assert {key: values[::-1] for key, *values in pairs(alone, whole)} == found
    assert {"measure.guidance.classifier", "measure.upsampling"} <= set(incomparable(alone, whole))
    assert not incomparable(whole, whole)


def test_every_effect_has_its_source_and_reaches_a_field_of_a_manifest():
    fields = {
        key
        for key, _, _ in pairs(
            made(
                reference={},
                decoder={},
                neighbours={},
                image={},
                quantiser="",
                nfe=1,
                upsampling={},
                guidance={"classifier": ""},
                labels={"order": ""},
            ),
            {},
        )
    }
    for prefix, effect in EFFECTS.items():
        assert effect.size, prefix
        assert effect.source or prefix == "model", prefix
        assert any(key == prefix or key.startswith(f"{prefix}.") for key in fields), prefix


def test_older_records_say_what_they_can():
    (path, *_) = sorted((REPOSITORY / "results" / "reference" / "evaluate").glob("*.json"))
    record = json.loads(path.read_text())
    record["values"].pop("manifest", None)
    record.pop("format")
    found = record_manifest(Record(**record))
    assert found["measure"]["num"] == 500
    assert found["measure"]["extractor"]["sha256"] == record["values"]["classifier_sha256"]


@pytest.mark.parametrize("num, name", [(50_000, "FID-50K"), (500, "FID-500"), (1500, "FID-1500")])
def test_a_score_carries_its_number_of_images(num: int, name: str):
    assert counted_name(FID, num) == name


def test_density_of_the_first_closed_balls_is_not_ranked_with_that_of_open_ones():
    old = made(neighbours={"k": 3})
    new = made(neighbours={"k": 3, "density_ball": "open"})
    field = "measure.neighbours.density_ball"
    assert pairs(old, new) == [(field, "closed", "open")]
    assert incomparable(old, new) == [field]
    assert "density" in effect_of(field).size

    # Small classifiers have no density, so their manifests say nothing of balls.
    digits = made(replace(SPEC, features="digits"), neighbours={"k": 3})
    assert with_defaults(digits) == digits


def test_tables_rank_across_the_balls_of_density_which_they_do_not_show():
    values = [
        {"manifest": made(neighbours={"k": 3})},
        {"manifest": made(neighbours={"k": 3, "density_ball": "open"})},
    ]
    spec = canonical(SPEC, full=True)
    old, new = (Record("0" * 16, "evaluate", "done", one, {}, "", spec) for one in values)
    assert clashes([new], [old]) == []
    assert fields_of_some([old, new]) == []


def scored(store: Store, row: int, fd: float, seed: int = 0, **found: Any) -> Path:
    spec = evaluate_stage(TABLE_4.rows[row], DIGITS, seed)
    shares = {"is_digits": 8.0, "precision_digits": 0.6, "recall_digits": 0.8, "agreement": 0.9}
    values = {"fd_digits": fd, **shares, "manifest": made(spec, **found)}
    record = store.append(spec, "done", values, PROVENANCE)
    return next((store.root / "records" / "evaluate").glob(f"{record.id}-{record.utc}-*.json"))


def test_tables_refuse_to_rank_across_protocols(tmp_path: Path):
    reference = tmp_path / "reference"
    for row in range(3):
        for seed in range(3):
            spec = evaluate_stage(TABLE_4.rows[row], DIGITS, seed)
            Store(tmp_path).append(
                spec,
                "done",
                {
                    "fd_digits": 10 + seed,
                    "is_digits": 8.0,
                    "precision_digits": 0.6,
                    "recall_digits": 0.8,
                    "agreement": 0.9,
                },
                PROVENANCE,
            )
    (tmp_path / "records").rename(reference)
    store = Store(tmp_path / "here", reference)
    scored(store, 0, 10.0)
    scored(store, 1, 1.0, extractor={"sha256": "cd"})
    scored(store, 2, 1.0)
    selection = Selection(TABLE_4, TABLE_4.rows[:3], DIGITS, (0,), "cpu")
    note = note_about(main_sheet(selection, store, store.here), "fd_digits against")
    assert (
        "Not compared, since scored by another protocol: "
        f"{TABLE_4.rows[1].label} (other extractor.sha256)" in note
    )
    assert TABLE_4.rows[1].label not in note.partition("Not compared")[0]
    assert f"better: {TABLE_4.rows[2].label}" in note


def test_a_table_names_the_fields_that_not_all_its_records_hold(tmp_path: Path):
    """A field that is declared, or belongs to a part of another name, is no gap."""
    store = Store(tmp_path)
    for row, found in enumerate(
        (
            dict(nfe=50, reference={"name": "a", "sha256": "b"}),
            dict(reference={"name": "a"}, sampler={"eta": 0.0}),
            dict(nfe=50, decoder={"name": "vae", "scale": 3}),
        )
    ):
        scored(store, row, 1.0, **found)
    alone, both = (
        note_texts(
            main_sheet(
                Selection(TABLE_4, TABLE_4.rows[:num], DIGITS, (0,), "cpu"), store, store.here
            )
        )
        for num in (1, 2)
    )
    assert not any("not recorded by all" in text for text in alone)
    assert [text for text in both if text.endswith(": nfe, reference.sha256.")]
    records = [store.here.latest(evaluate_stage(row, DIGITS, 0)) for row in TABLE_4.rows[:3]]
    assert fields_of_some(records) == ["nfe"]
    assert fields_of_some([]) == []


def test_no_verdict_is_given_across_protocols(tmp_path: Path):
    """Scores are called far off only if one protocol measured them, on whatever machine."""
    store = Store(tmp_path)
    for row in range(2):
        for seed in range(3):
            scored(store, row, 10.0 + seed, seed)
    (tmp_path / "records").rename(tmp_path / "reference")
    store.refresh()
    scored(store, 0, 90.0, flags={"matmul_tf32": True, "cudnn_tf32": False})
    scored(store, 1, 90.0, versions={"torch": "3"}, extractor={"sha256": "cd"})
    sheet = comparison_sheet(Selection(TABLE_4, TABLE_4.rows[:3], DIGITS, (0,), "cpu"), store)
    assert [text.partition(",")[0] for text in texts(sheet, "reproduced")] == [
        "other protocol",
        "no: fd_digits",
        "-",
    ]
    assert "measured with another flags.matmul_tf32." in note_about(sheet, "no verdict")
    assert "another extractor.sha256, versions.torch." in note_about(sheet, "another machine")
    assert note_about(sheet, "all 5 comparisons")


def diff(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "experiments/diff_protocol.py", *map(str, paths)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def test_the_script_prints_what_differs_and_what_that_does(tmp_path: Path):
    store = Store(tmp_path)
    a = scored(store, 0, 1.0)
    b = scored(store, 1, 1.0)
    c = scored(store, 2, 1.0, labels={"policy": "random"})
    same = diff(a, b)
    other = diff(a, c)
    assert same.returncode == 0
    assert "may be compared" in same.stdout
    assert "mixer_options.activation: not set | relu" in same.stdout
    guided, raw = (
        scored(store, 3 + k, 1.0, **changed)
        for k, changed in enumerate((dict(guidance={"scale": 1.5}), {}))
    )
    record = json.loads(raw.read_text())
    record["values"]["manifest"]["model"]["key"] = "none: flat"
    raw.write_text(json.dumps(record))
    assert (
        "as w in U-ViT's formula, (1 + w) conditional - w null: 0 | 0.5\n" in diff(a, guided).stdout
    )
    assert diff(a, raw).returncode == 1
    assert "6.06 against 8.1" in diff(a, raw).stdout
    assert other.returncode == 1
    assert "measure.labels.policy: balanced | random" in other.stdout
    assert "about 0.1" in other.stdout
    assert "RAE README" in other.stdout


def test_the_script_tells_what_was_done_without_from_what_is_not_recorded(tmp_path: Path):
    store = Store(tmp_path)
    plain = scored(store, 0, 1.0, reference={"name": "a"}, decoder={"name": "none"})
    guided = scored(
        store,
        1,
        1.0,
        guidance={"classifier": "p", "classifier_scale": 2.0},
        reference={"name": "a", "sha256": "b"},
        decoder={"name": "vae", "scale": 3},
    )
    done = diff(plain, guided)
    assert done.returncode == 1
    assert (
        "measure.guidance.classifier: without | p, scale 2.0\n"
        "    known effect: 10.94 without, 4.59 with" in done.stdout
    )
    assert "measure.decoder.scale: without | 3\n" in done.stdout
    assert f"{plain.name} does not record measure.reference.sha256\n" in done.stdout
    assert done.stdout.count("does not record") == 1


def test_the_script_refuses_what_is_no_evaluate_record(tmp_path: Path):
    (tmp_path / "a.json").write_text("{}")
    train = next((REPOSITORY / "results" / "reference" / "train").glob("*.json"))
    for bad in (tmp_path / "a.json", tmp_path / "missing.json", train):
        done = diff(bad, bad)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    complaint = "error: cannot read none.json: No such file or directory"
    assert diff("none.json", "none.json").stderr.startswith(complaint)


def test_every_committed_score_holds_what_decided_it():
    paths = sorted((REPOSITORY / "results" / "reference" / "evaluate").glob("*.json"))
    assert paths
    assert not [
        path.name
        for path in paths
        if "hash" not in json.loads(path.read_text())["values"].get("manifest", {})
    ]


def test_a_field_that_older_records_lack_leaves_them_comparable():
    """New scores on small classifiers name the reference's hash and the labels' order."""
    (path, *_) = sorted((REPOSITORY / "results" / "reference" / "evaluate").glob("*.json"))
    old, new = (json.loads(path.read_text())["values"]["manifest"] for _ in range(2))
    for part, key in (("reference", "sha256"), ("labels", "order")):
        old["measure"][part].pop(key, None)
        new["measure"][part][key] = "said"
    assert not incomparable(old, new)
    assert pairs(old, new) == [
        ("measure.labels.order", Missing.NOT_RECORDED, "said"),
        ("measure.reference.sha256", Missing.NOT_RECORDED, "said"),
    ]
