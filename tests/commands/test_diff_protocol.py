"""`diff_protocol.py` prints in what two scores differ, and what each difference does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import diff_protocol
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from tests.support.manifests import write_score
from tests.support.score_scripts import Script


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(diff_protocol, capsys, monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_two_models_under_one_protocol_may_be_compared(script: Script, store: Store):
    status, out, _ = script.run(write_score(store, 0, 1.0), write_score(store, 1, 1.0))
    assert status == 0
    assert "may be compared" in out
    assert "mixer_options.activation: not set | relu" in out


def test_a_difference_in_protocol_is_printed_with_its_effect_and_source(
    script: Script, store: Store
):
    random = write_score(store, 1, 1.0, labels={"policy": "random"})
    status, out, _ = script.run(write_score(store, 0, 1.0), random)
    assert status == 1
    assert "measure.labels.policy: balanced | random" in out
    assert "about 0.1" in out
    assert "RAE README" in out


def test_the_scale_of_guidance_is_printed_in_both_formulas(script: Script, store: Store):
    guided = write_score(store, 1, 1.0, guidance={"scale": 1.5})
    _, out, _ = script.run(write_score(store, 0, 1.0), guided)
    assert "as w in U-ViT's formula, (1 + w) conditional - w null: 0 | 0.5\n" in out


def test_weights_that_are_no_average_are_another_protocol(script: Script, store: Store):
    raw = write_score(store, 1, 1.0)
    record = json.loads(raw.read_text())
    record["values"]["manifest"]["model"]["key"] = "none: flat"
    raw.write_text(json.dumps(record))
    status, out, _ = script.run(write_score(store, 0, 1.0), raw)
    assert status == 1
    assert "6.06 against 8.1" in out


def test_what_was_done_without_is_told_from_what_is_not_recorded(script: Script, store: Store):
    plain = write_score(store, 0, 1.0, reference={"name": "a"}, decoder={"name": "none"})
    guided = write_score(
        store,
        1,
        1.0,
        guidance={"classifier": "p", "classifier_scale": 2.0},
        reference={"name": "a", "sha256": "b"},
        decoder={"name": "vae", "scale": 3},
    )
    status, out, _ = script.run(plain, guided)
    assert status == 1

    # A classifier and a decoder are parts that the first one does without.
    without = "measure.guidance.classifier: without | p, scale 2.0\n"
    assert f"{without}    known effect: 10.94 without, 4.59 with" in out
    assert "measure.decoder.scale: without | 3\n" in out

    # The hash of the reference is the only gap.
    assert f"{plain} does not record measure.reference.sha256\n" in out
    assert out.count("does not record") == 1


def empty_file(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text("{}")
    return path


def missing_file(folder: Path) -> Path:
    return folder / "missing.json"


def training_record(folder: Path) -> Path:
    return next((REPOSITORY / "results" / "reference" / "train").glob("*.json"))


@pytest.mark.parametrize("unfit", [empty_file, missing_file, training_record])
def test_what_is_no_record_of_scores_is_refused(
    unfit: Callable[[Path], Path], script: Script, tmp_path: Path
):
    path = unfit(tmp_path)
    script.refuse(path, path)


def test_a_file_that_is_not_there_is_named(script: Script):
    assert script.refuse("none.json", "none.json").startswith("error: cannot read none.json: ")


def test_the_choices_of_a_score_on_coco_are_printed_with_what_is_known(
    script: Script, store: Store
):
    uvit = dict(
        decoder={"scale": 0.2301}, selection="the last average", sampler={"name": "dpm_solver_3s"}
    )
    repa = dict(decoder={"scale": 0.18215}, selection="the best of 20", sampler={"name": "sde"})
    a, b = (write_score(store, seed, 1.0, **m) for seed, m in enumerate((uvit, repa)))
    status, out, _ = script.run(a, b)
    assert status == 1
    assert "measure.decoder.scale: 0.2301 | 0.18215" in out
    assert "the inverse deviation of its latents" in out
    assert "6.05 by 50 Euler steps against 5.30 by 250 of the SDE" in out
    assert "the best of 20 checkpoints by FID-10K" in out
