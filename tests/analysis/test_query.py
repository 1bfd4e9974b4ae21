"""Queries over committed records, and what is looked through before it enters a table."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from analysis.figures.tradeoffs import score_against_speed
from analysis.page.scatter import views
from analysis.published import FILES
from analysis.query import (
    ReferenceStore,
    at_one_batch,
    frame,
    gpu_timings,
    numeric_mode,
    rankable,
)
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Backbone, Timing, spec_id
from experiments.engine.specs.stages import evaluate_stage
from tests.support.imports import loaded_modules
from tests.support.references import GPU_PROVENANCE, commit_records, timing_values


def test_a_frame_has_a_row_per_record_and_a_column_per_field():
    """A frame can be queried by fields of specs, values and provenance."""
    store = ReferenceStore()
    table = frame(store)
    records = {record.name: record for record in store.all_records()}
    assert set(table.index) == set(records)
    assert table.index.is_unique

    # Scores on digits, by a query and record by record.
    scored = table.query("kind == 'evaluate' and `spec.features` == 'digits'")
    evaluations = [record for record in records.values() if record.kind == "evaluate"]
    on_digits = [record for record in evaluations if record.spec["features"] == "digits"]
    expected = {record.name: record.values["fd_digits"] for record in on_digits}
    assert scored["values.fd_digits"].to_dict() == expected

    # Columns keep their types, and what a record lacks is missing.
    assert scored["spec.train.seed"].dtype.kind in "if"
    assert scored["values.images_per_s"].isna().all()
    versions = {record.provenance["torch"] for record in on_digits}
    assert set(scored["provenance.torch"]) == versions


def test_a_frame_of_no_records_is_empty(tmp_path: Path):
    assert frame(ReferenceStore(tmp_path)).empty


def test_pandas_is_imported_by_the_frame_alone():
    assert "pandas" not in loaded_modules("import analysis.query, analysis.build")


def time_network(store: Store, name: str, batch: int) -> None:
    stage = Timing(Backbone(name), 32, 4, 1000, batch, "cuda")
    provenance = GPU_PROVENANCE | {"kernels": {}}
    store.append(stage, "done", timing_values(float(batch)), provenance)


def test_networks_are_compared_at_one_batch(tmp_path: Path):
    """The batch that most networks have, up to the paper's 64; the largest of several."""
    store = Store(tmp_path)
    batches = {"dico_xl": (16, 64, 128), "dit_xl_2": (16, 128), "dis_h_2": (16, 64)}
    for name, timed in batches.items():
        for batch in timed:
            time_network(store, name, batch)
    committed = commit_records(tmp_path)
    timings = {name: gpu_timings(Backbone(name), 32, committed) for name in batches}
    compared = {key: sorted(networks) for key, networks in at_one_batch(timings).items()}
    assert compared == {("fp32, TF32 off", "a GPU", 16): ["dico_xl", "dis_h_2", "dit_xl_2"]}
    del timings["dit_xl_2"]
    assert [batch for _, _, batch in at_one_batch(timings)] == [64]


@pytest.mark.parametrize("change", [{"what": "training"}, {"compile": True}, {"graphs": True}])
def test_only_plain_forward_passes_are_throughput(change: dict[str, object], tmp_path: Path):
    store = Store(tmp_path)
    time_network(store, "dico_xl", 64)
    stage = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", **change)
    store.append(stage, "done", timing_values(), GPU_PROVENANCE)
    (record,) = gpu_timings(Backbone("dico_xl"), 32, commit_records(tmp_path))
    assert numeric_mode(record) == "fp32, TF32 off"
    assert record.spec["what"] == "forward"


def change_manifest(folder: Path, label: str, field: str, value: object) -> ReferenceStore:
    """The committed records, but one row's scores on digits under another protocol."""
    shutil.copytree(REPOSITORY / "results" / "reference", folder / "reference")
    name = spec_id(evaluate_stage(TABLE_4.row(label), DIGITS, 0))
    (path,) = (folder / "reference" / "evaluate").glob(f"{name}-*.json")
    record = json.loads(path.read_text())
    record["values"]["manifest"]["measure"][field] = value
    path.write_text(json.dumps(record))
    return ReferenceStore(folder)


def test_a_row_of_another_protocol_is_not_ranked(tmp_path: Path):
    row = TABLE_4.rows[3]
    store = change_manifest(tmp_path, row.label, "quantiser", "rounds to nearest")
    scores, refused = rankable(TABLE_4.rows, DIGITS, store)
    assert list(refused) == [row.label]
    assert [bool(records) for records in scores] == [other != row for other in TABLE_4.rows]


def test_a_record_of_another_extractor_is_ordered_by_nothing(tmp_path: Path):
    """Neither by a figure nor by the scatter."""
    store = change_manifest(tmp_path, "w/o CCA", "extractor", {"sha256": "0" * 64})
    (view,) = [view for view in views(store) if "Table 4" in view["name"]]
    assert view["name"].endswith("w/o CCA)")
    assert not any("w/o CCA" in text for text in view["data"][0]["text"])
    drawing = score_against_speed(TABLE_4, store)
    assert "w/o CCA" not in drawing.axes[0].get_legend_handles_labels()[1]
    assert drawing.get_supxlabel().endswith("w/o CCA")


def test_a_published_file_that_is_missing_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="restore it"):
        ReferenceStore(None, tmp_path).rows("table1.csv")


def test_a_published_row_without_a_source_is_one_line(tmp_path: Path):
    contents = FILES["table7.csv"]
    columns = [*contents.words, *contents.numbers, "source"]
    numbers = ",".join("1" for _ in contents.numbers)
    (tmp_path / "table7.csv").write_text(f"{','.join(columns)}\nDiCo-S,{numbers},\n")
    with pytest.raises(ValueError, match="line 2: no source"):
        ReferenceStore(None, tmp_path).rows("table7.csv")


@pytest.mark.parametrize("content", [b"model," + b"x" * 140_000, b"model\n\xff\n"])
def test_a_published_file_that_is_no_csv_is_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "table7.csv").write_bytes(content)
    message = (
        "^published data table7.csv: no CSV in UTF-8 .*; "
        "restore it with git checkout results/published$"
    )
    with pytest.raises(ValueError, match=message):
        ReferenceStore(None, tmp_path).rows("table7.csv")


@pytest.mark.parametrize("name", FILES)
def test_every_published_row_names_its_source(name: str):
    """Files of other papers name an archive's number or a repository."""
    others = {
        "code.csv": "arXiv:2411.17787",
        "tablerelated.csv": r"arXiv:\d{4}\.\d{5}|README of",
        "tablerelated-small.csv": r"arXiv:\d{4}\.\d{5}",
        "tableternary.csv": "arXiv:2405.14854",
        "cards.csv": "NVIDIA .*(data sheet|white paper|architecture)",
    }
    sources = others.get(name, "arXiv:2505.11196|authors' log")
    for row in ReferenceStore().rows(name):
        assert re.search(sources, row["source"]), row
