"""Records of other laboratories: their schemas, what refuses them, and what they would change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import contribute, contributed, schema
from analysis.reference import ReferenceStore
from experiments.ablation import TABLE_4
from experiments.engine.records.store import FORMAT, Record
from experiments.engine.records.tree import REPOSITORY, own_environment, tree_digest
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import cost_stage, timing_stage

STORE = ReferenceStore()
DICO = TABLE_4.baseline
Content = dict[str, Any]


@pytest.fixture(scope="module")
def head() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git repository here")
    return done.stdout.strip()


def content_of(record: Record, head: str) -> Content:
    """Return a committed record as a laboratory would have measured it at a commit."""
    content: Content = json.loads(json.dumps({"format": FORMAT} | vars(record)))
    code = contributed.tree_digest_at(head)
    content["provenance"] |= {"commit": head, "code": code, "dirty": False}
    return content


@pytest.fixture
def timing(head: str) -> Content:
    record = STORE.reference.latest(timing_stage(DICO, DICO, "cpu"))
    assert record is not None
    content = content_of(record, head)
    content["values"]["images_per_s"] *= 2
    content["utc"] = "20261129T000000Z"
    return content


@pytest.fixture
def cost(head: str) -> Content:
    record = STORE.reference.latest(cost_stage(DICO))
    assert record is not None
    return content_of(record, head)


# ---- Schemas


@pytest.mark.parametrize("kind", schema.KINDS)
def test_committed_schemas_are_current(kind: str):
    path = schema.FOLDER / f"{kind}.json"
    advice = "run python -m analysis.schema"
    assert path.read_text() == schema.schema_text(kind), advice


def test_every_committed_record_fits_its_schema_and_its_id():
    schemas = {kind: schema.record_schema(kind) for kind in schema.KINDS}
    for record in STORE.reference.all():
        whole = schemas[record.kind]
        content = {"format": FORMAT} | vars(record)
        assert list(contributed.violations(content, whole, whole)) == [], record.name
        cls = schema.KINDS[record.kind]
        assert cls is not None
        assert spec_id(schema.spec_of(record.spec, cls)) == record.id, record.name


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("spec", "batch"), 4.5, "spec.batch: 4.5 is no integer"),
        (("spec", "batch"), True, "spec.batch: True is no integer"),
        (("spec", "secret"), 1, "spec.secret: unknown field"),
        (("spec", "backbone", "kind"), "Data", "spec.backbone.kind: 'Data', expected 'Backbone'"),
        (("status",), "fine", "status: 'fine', expected one of"),
        (("id",), "xyz", "id: 'xyz' does not match"),
        (("values",), [], "values: [] is no object"),
        (("spec", "baseline_input"), [1, 2, 3], "spec.baseline_input: [1, 2, 3] is of none"),
    ],
)
def test_own_and_public_validators_refuse_the_same(
    timing: Content, place: tuple[str, ...], value: Any, message: str
):
    part = timing
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (problem, *_) = contributed.problems_with(timing, STORE)
    assert problem.startswith(message)

    # An independent implementation of JSON Schema agrees.
    library = pytest.importorskip("jsonschema")
    validator = library.Draft202012Validator(schema.record_schema("timing"))
    assert not validator.is_valid(timing)


def test_the_digest_at_a_commit_is_the_digest_of_its_tree(head: str, tmp_path: Path):
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", head], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive, check=True)

    # The tree of that commit computes its own digest.
    module = "from experiments.engine.records.tree import tree_digest; print(tree_digest())"
    done = subprocess.run(
        [sys.executable, "-c", module],
        cwd=tmp_path,
        env=own_environment({}) | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == contributed.tree_digest_at(head)
    assert contributed.tree_digest_at("0" * 40) is None
    assert len(tree_digest()) == 16


# ---- What refuses a record


def edit(*place: str, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        part = content
        for name in place[:-1]:
            part = part.setdefault(name, {})
        part[place[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (edit("spec", "batch", value=5), "id: the spec's is"),
        (edit("provenance", "dirty", value=True), "provenance.dirty: the tree had uncommitted"),
        (edit("provenance", "commit", value="0" * 40), "provenance.commit: 000"),
        (edit("provenance", "code", value="0" * 16), "provenance.code: 000"),
        (edit("utc", value="29990101T000000Z"), "utc: 29990101T000000Z is in the future"),
        (edit("values", "images_per_s", value=-1.0), "values.images_per_s: -1.0, expected more"),
        (edit("values", "images_per_s", value=float("nan")), "values: images_per_s is no number"),
        (edit("values", "note", value="/data/alice/run 1"), "values.note: holds a path"),
        (edit("values", "note", value="ask bob@example.org"), "values.note: holds an address"),
        (edit("provenance", "user", value="alice"), "provenance.user: a field that may name"),
        (edit("provenance", "x", value="gpu-7.internal"), "provenance.x: holds a host"),
        (edit("values", value={}), "values: empty, and the record is done"),
        (edit("kind", value="poem"), "kind: 'poem' is none of"),
    ],
)
def test_what_no_table_may_hold_is_refused(
    timing: Content, change: Callable[[Content], None], message: str
):
    assert contributed.problems_with(timing, STORE) == []
    change(timing)
    assert [p for p in contributed.problems_with(timing, STORE) if p.startswith(message)]


def test_a_count_must_equal_ours(cost: Content):
    assert contributed.problems_with(cost, STORE) == []
    cost["values"]["macs_core"] += 1
    (problem,) = contributed.problems_with(cost, STORE)
    assert problem.startswith("values.macs_core: ")


def test_scores_must_be_of_their_manifest(head: str):
    records = [r for r in STORE.reference.all() if r.kind == "evaluate" and r.status == "done"]
    record = max((r for r in records if "manifest" in r.values), key=lambda r: r.utc)
    content = content_of(record, head)
    assert contributed.problems_with(content, STORE) == []
    content["values"]["manifest"]["measure"]["num"] += 1
    (problem,) = contributed.problems_with(content, STORE)
    assert problem.startswith("values.manifest.hash: ")


# ---- The command


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with the records of DiCo-S alone."""
    for stage in (cost_stage(DICO), timing_stage(DICO, DICO, "cpu")):
        record = STORE.reference.latest(stage)
        assert record is not None
        path = tmp_path / "results" / "reference" / STORE.file_of(record)
        path.parent.mkdir(parents=True)
        path.write_text((STORE.reference.folder / STORE.file_of(record)).read_text())
    return tmp_path / "results"


def test_the_command_tells_what_would_change_and_adds_the_record(
    timing: Content,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(contribute, "SHEETS", {"table4": contribute.SHEETS["table4"]})
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(timing))
    words = [str(file), "--origin", "Example Laboratory", "--results", str(results)]
    assert contribute.main(words) == 0
    old = timing["values"]["images_per_s"] / 2
    out = capsys.readouterr().out
    assert f"table4, DiCo-S, img_s: {old:.1f} " in out
    assert f"-> {2 * old:.1f} " in out

    # Nothing was added yet; --add keeps the file and notes the origin.
    assert len(list((results / "reference" / "timing").iterdir())) == 1
    assert contribute.main([*words, "--add"]) == 0
    store = ReferenceStore(results)
    newest = store.reference.latest(timing_stage(DICO, DICO, "cpu"))
    assert newest is not None
    assert newest.provenance["origin"] == "Example Laboratory"
    assert newest.values == timing["values"]
    notes = [note.text for note in contribute.SHEETS["table4"](store).notes]
    assert "Some records are contributed, by Example Laboratory." in notes
    capsys.readouterr()

    # The same record is not added twice.
    assert contribute.main([*words, "--add"]) == 1
    assert capsys.readouterr().out == "problem: the committed records hold it already\n"


def test_bad_files_and_origins_are_one_line(
    tmp_path: Path, timing: Content, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    assert contribute.main([str(file), "--origin", "Example"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    file.write_text(json.dumps(timing))
    assert contribute.main([str(file), "--origin", "a/b"]) == 2
    assert "--origin takes the name of a laboratory" in capsys.readouterr().err


def test_hosts_of_attempts_are_left_out(timing: Content):
    timing["values"]["attempts"] = [{"host": "node7", "steps": 3}]
    fields = {name: value for name, value in timing.items() if name != "format"}
    clean = contributed.anonymous(Record(**fields))
    assert clean.values["attempts"] == [{"steps": 3}]
    assert contributed.problems_with(timing, STORE)
    assert contributed.problems_with({"format": FORMAT} | vars(clean), STORE) == []
