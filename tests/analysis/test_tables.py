"""The tables of the paper: published rows, differences, ranks and footnotes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.query import ReferenceStore
from analysis.tables.paper import SHEETS
from analysis.tables.progress import progress_row, stopped
from analysis.tables.ranks import Rank, rank_rows
from analysis.tables.recipes import CONFIGURATIONS, recipe_sheet
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.paired import compare_paired
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.sheet import Topic
from experiments.engine.specs.spec import Backbone, Timing
from experiments.engine.specs.stages import evaluate_stage, timing_stage
from experiments.main_results import TABLES
from tests.support.imports import loaded_modules
from tests.support.references import (
    GPU_PROVENANCE,
    PROVENANCE,
    add_losses,
    commit_records,
    digits_values,
    timing_values,
)
from tests.support.sheets import labelled, note_about, note_texts, row_of, texts

PUBLISHED = REPOSITORY / "results" / "published"
HALF_TF32 = {"cudnn_tf32": True, "matmul_tf32": False}


@pytest.fixture(scope="module")
def committed() -> ReferenceStore:
    return ReferenceStore()


@pytest.mark.parametrize("name", SHEETS)
def test_every_table_prints_with_and_without_records(
    name: str, committed: ReferenceStore, tmp_path: Path
):
    """Its notes are sentences."""
    for store in (committed, ReferenceStore(tmp_path)):
        sheet = SHEETS[name](store)
        labels = texts(sheet, sheet.columns[0].key)
        # Predictions are data of their own, without which their tables have no rows.
        assert labels or (store is not committed and name.startswith(("predicted_", "memory")))
        for form in FORMATS:
            printed = render([sheet], form).replace("\\", "")
            assert all(label in printed for label in labels[:1])
        for text in note_texts(sheet):
            assert text.endswith((".", "?")) or "failed:" in text, text
        assert not store.problems


@pytest.mark.parametrize("number", [1, 2, 8, 9])
def test_tables_of_systems_hold_every_published_row(number: int, committed: ReferenceStore):
    sheet = SHEETS[f"table{number}"](committed)
    ours = sorted(zip(texts(sheet, "row"), texts(sheet, "paper_fid"), strict=True))
    theirs = sorted((row["model"], row["fid"]) for row in committed.rows(f"table{number}.csv"))
    assert sorted(fid for _, fid in ours) == sorted(fid for _, fid in theirs)
    for model, fid in theirs:
        assert any(label.startswith(model) and fid == printed for label, printed in ours)


def test_an_image_costs_what_the_rule_says_in_every_system(committed: ReferenceStore):
    """VAR draws its scales once, and a diffusion network is evaluated 250 times, guided."""
    sheet = SHEETS["images"](committed)
    rows = {(cells["system"].text(), cells["resolution"].text()): cells for cells in sheet.rows}
    guided = {key: f"{cells['guided'].value:.4g}" for key, cells in rows.items()}
    expected = {"VAR-d30": "1.895", "DiT-XL/2": "59.31", "DiCo-XL": "43.61", "DiMR-XL/2R": "80.09"}
    assert {name: guided[name, "256"] for name in expected} == expected
    assert {name: guided[name, "512"] for name in ("VAR-d36-s", "DiT-XL/2")} == {
        "VAR-d36-s": "11.4",
        "DiT-XL/2": "262.3",
    }

    # What two networks save is counted; how much faster they are was published for three splits.
    savings = {n: rows[f"CoDe N={n}", "256"] for n in (9, 8, 7, 6)}
    assert [cells["saving"].text() for cells in savings.values()] == [
        "1.28",
        "1.89",
        "2.61",
        "3.43",
    ]
    assert [cells["speed_up"].text() for cells in savings.values()] == ["1.2", "1.7", "-", "2.9"]


@pytest.mark.parametrize("number", [1, 2, 8, 9])
def test_the_scores_of_a_family_stand_once(number: int, committed: ReferenceStore):
    """DiCo-S, B, L and XL are one network on digits, and so are DiT's sizes."""
    assert not SHEETS[f"table{number}"](committed).has("fd_digits")
    families = SHEETS["families"](committed)
    scores = texts(families, "fd_digits")
    assert len(set(scores)) == len(scores)
    named = " ".join(texts(families, "stands_for"))
    for row in TABLES[number].rows:
        if row.backbone:
            assert row.label in named, f"no family stands for {row.label}"


def test_two_networks_of_one_label_are_two_families(committed: ReferenceStore):
    """ADM-U halves an image of 512 pixels once more than one of 256."""
    families = SHEETS["families"](committed)
    stands_for = dict(zip(texts(families, "row"), texts(families, "stands_for"), strict=True))
    assert stands_for["ADM-U"] == "Table 1: ADM-U; Table 8: ADM-U"
    assert stands_for["ADM-U of Table 2"] == "Table 2: ADM-U; Table 9: ADM-U"


def test_differences_are_in_per_cent_of_the_paper(committed: ReferenceStore):
    row = row_of(SHEETS["table2"](committed), "DiCo-XL, 3M")
    paper, ours, difference = (
        row[key].value for key in ("gflops_paper", "gflops_same", "gflops_diff")
    )
    assert paper == 349.78
    assert difference == pytest.approx(100 * (ours - paper) / paper)
    assert -0.5 < difference < -0.4


def test_table_5_gives_the_difference_of_its_ratio(committed: ReferenceStore):
    row = labelled(SHEETS["table5"](committed), "DiCo-S")
    keys = ("dit_ratio_paper", "dit_ratio", "dit_ratio_diff")
    paper, ours, difference = (float(row[key]) for key in keys)
    assert difference == pytest.approx(100 * (ours / paper - 1), abs=0.1)


@pytest.mark.parametrize("name", ["table1", "table3", "table5"])
def test_a_number_of_ours_leads_to_its_records(name: str, committed: ReferenceStore):
    sheet = SHEETS[name](committed)
    for key in ("params", "gflops", "gflops_core"):
        for cell in sheet.values(key):
            assert cell.records or cell.is_gap, (name, key)


def test_table_6_names_every_field_that_differs(
    committed: ReferenceStore, monkeypatch: pytest.MonkeyPatch
):
    assert "Different: none." in note_about(recipe_sheet(committed), "declared fields equal")
    other = replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, lr=3e-4))
    monkeypatch.setitem(CONFIGURATIONS, "DiCo-S 256", (CONFIGURATIONS["DiCo-S 256"][0], other))
    note = note_about(recipe_sheet(committed), "declared fields equal")
    assert note.endswith("Different: DiCo-S 256: peak lr.")


def test_table_6_without_a_model_or_its_log_says_so(tmp_path: Path):
    published = shutil.copytree(PUBLISHED, tmp_path / "published")
    for name, model in (("table6.csv", "DiCo-B"), ("dico_logs.csv", "DiCo-L")):
        lines = (published / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(f"{model},")]
        (published / name).write_text("".join(kept))
    sheet = recipe_sheet(ReferenceStore(None, published))
    assert "since table6.csv has no row of it" in note_about(sheet, "DiCo-B: its hours")
    reason = "since dico_logs.csv has no line of it to step 400000"
    assert reason in note_about(sheet, "DiCo-L: its hours")


def test_ranks_are_intervals_that_only_resolved_differences_narrow():
    """A row ranks from the first to the last place that its seeds leave open."""

    def ranks(noise: float) -> list[Rank]:
        scores = {
            row: {seed: mean * (1 + noise * ((7 * at + 3 * seed) % 5 - 2)) for seed in range(3)}
            for at, (row, mean) in enumerate({"a": 1.0, "b": 2.0, "c": 4.0}.items())
        }
        found = rank_rows(compare_paired(scores))
        return [found[row] for row in "abc"]

    assert ranks(0.001) == [Rank(1, 1), Rank(2, 2), Rank(3, 3)]
    assert ranks(0.3) == [Rank(1, 3)] * 3


def test_only_what_is_first_for_certain_is_bold(tmp_path: Path):
    add_losses(Store(tmp_path / "a"), {})
    sheet = SHEETS["table4"](commit_records(tmp_path / "a"))
    assert not any(cell.best for row in sheet.rows for cell in row.values())
    assert "1 to 11" in texts(sheet, "rank")

    # Scores of samples stand beside losses, and a loss alone is no finished run.
    store = Store(tmp_path / "b")
    add_losses(store, {"w/o CCA": 0.5})
    for row in TABLE_4.rows:
        for seed in range(3):
            stage = evaluate_stage(row, DIGITS, seed)
            store.append(stage, "done", digits_values(10.0, "digits_judge"), PROVENANCE)
    sheet = SHEETS["table4"](commit_records(tmp_path / "b"))
    best = [row["row"].label for row in sheet.rows if any(cell.best for cell in row.values())]
    assert best == ["w/o CCA"]
    assert "**0.50008 ±0.00" in render([sheet], "markdown")
    assert "<b>0.50008 ±0.00" in render([sheet], "html")
    assert "\\textbf{0.50008 $\\pm$0.00" in render([sheet], "latex")


def test_numeric_modes_of_a_gpu_stand_side_by_side(tmp_path: Path):
    """Every mode has two columns: the largest batch up to the paper's, and its difference."""
    store = Store(tmp_path)
    spec = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", baseline=Backbone("dit_s_2"))

    def timed(mode: str, batch: int, rate: float, flags: dict[str, bool]) -> None:
        stage = replace(spec, precision=mode, batch=batch)
        provenance = GPU_PROVENANCE | {"precision_flags": flags}
        store.append(stage, "done", timing_values(rate, 0.5), provenance)

    # One batch in fp32, and three as the authors' code runs.
    timed("fp32", 64, 80.0, PROVENANCE["precision_flags"])
    timed("as_published", 64, 200.0, HALF_TF32)
    timed("as_published", 16, 150.0, HALF_TF32)
    timed("as_published", 1024, 300.0, HALF_TF32)

    # The columns of this GPU.
    sheet = SHEETS["table1"](commit_records(tmp_path))
    row = labelled(sheet, "DiCo-XL")
    columns = [column for column in sheet.columns if column.group == "ours, a GPU"]
    assert {column.title: row[column.key] for column in columns} == {
        "img/s, as_published, TF32 cudnn": "200.00 ±0.50",
        "diff. %, as_published, TF32 cudnn": "-4.06",
        "img/s, fp32, TF32 off": "80.00 ±0.50",
        "diff. %, fp32, TF32 off": "-61.63",
    }
    assert note_about(sheet, "largest timed batch up to the paper's 64")


DIFFERENCES = {
    "ours_fid": "54.97 ±0.20",
    "ours_fid_corrected": "54.50",
    "ours_fid_diff": "10.00",
    "ours_is": "30.00",
    "ours_is_diff": "-4.40",
    "ours_precision": "0.50",
    "ours_precision_diff": "4.17",
    "ours_recall": "0.60",
    "ours_recall_diff": "3.45",
}
DIFFERENCES_7 = DIFFERENCES | {
    "ours_sfid": "11.00",
    "ours_sfid_diff": "-3.59",
    "ours_precision_diff": "3.95",
    "ours_recall_diff": "3.09",
}


@pytest.mark.parametrize(
    "number, expected", [(1, DIFFERENCES), (4, DIFFERENCES), (7, DIFFERENCES_7)]
)
def test_a_score_under_the_papers_conditions_stands_beside_its_row(
    number: int, expected: dict[str, str], tmp_path: Path
):
    """DiCo-S after 400K steps is one run of Tables 1, 4 and 7."""
    values = dict(fid=54.967, fid_se=0.2, fid_corrected=54.5, sfid=11.0, precision=0.5, recall=0.6)
    stage = evaluate_stage(TABLE_4.rows[0], IMAGENET256, 0)
    dirty = PROVENANCE | {"dirty": True}
    record = Store(tmp_path).append(stage, "done", values | {"is": 30.0}, dirty)

    # One row alone leads to the record.
    sheet = SHEETS[f"table{number}"](commit_records(tmp_path))
    names = [{own.name for cell in row.values() for own in cell.records} for row in sheet.rows]
    holds_record = [record.name in of_row for of_row in names]
    assert holds_record.count(True) == 1
    at = holds_record.index(True)
    assert texts(sheet, sheet.columns[0].key)[at] == "DiCo-S"

    # It holds every metric and its difference, and a note warns of the dirty tree.
    ours = {key: texts(sheet, key)[at] for key in expected}
    assert ours == expected
    assert note_about(sheet, "uncommitted changes")


def test_a_row_of_an_ablation_is_timed_on_a_gpu_too(tmp_path: Path):
    store = Store(tmp_path)
    stage = timing_stage(TABLE_4.rows[4], TABLE_4.rows[0], "cuda")
    store.append(stage, "done", timing_values(1234.0, 5.0), GPU_PROVENANCE)
    sheet = SHEETS["table4"](commit_records(tmp_path))
    (column,) = [column for column in sheet.columns if column.title.startswith("img/s, fp32")]
    assert column.title == "img/s, fp32, TF32 off, attention unfused"
    assert texts(sheet, column.key) == ["-"] * 4 + ["1234.00 ±5.00"] + ["-"] * 6


def test_the_papers_own_units_stand_beside_ours(committed: ReferenceStore):
    """A published number is printed as in the paper, in millions or billions."""
    table4 = SHEETS["table4"](committed)
    table8 = SHEETS["table8"](committed)
    published = [row["throughput_img_s"] for row in committed.rows("table4.csv")]
    assert texts(table4, "paper_img_s") == published

    # The difference is that of 675.1, which includes the frozen table of positions.
    dit = labelled(table8, "DiT-XL/2")
    keys = ("params_paper", "params", "params_diff")
    assert [dit[key] for key in keys] == ["675M", "674.8", "0.02"]
    assert "VAR-d24, VAR-d30, DiC-H, DiCo-H" in note_about(table8, "published in billions")


@pytest.mark.parametrize(
    "number, label, every",
    [(8, "DiT-XL/2", 675.1), (8, "DiMSUM-L/2", 459.9), (9, "SiT-XL", 676.0)],
)
def test_frozen_parameters_are_told_apart(
    number: int, label: str, every: float, committed: ReferenceStore
):
    sheet = SHEETS[f"table{number}"](committed)
    row = row_of(sheet, label)
    expected = 100 * (every / row["params_paper"].value - 1)
    assert row["params_diff"].value == pytest.approx(expected, abs=0.01)
    note = note_about(sheet, "params: ours are those that train")
    assert f"{label} {every}" in note
    assert "DiCo-XL" not in note


def test_a_table_is_cut_into_narrow_ones_without_losing_a_column(committed: ReferenceStore):
    for name, make_sheet in SHEETS.items():
        sheet = make_sheet(committed).without_empty_columns()
        topics = sheet.topics() or [Topic.ROW]
        parts = [{column.key for column in sheet.about(topic).columns} for topic in topics]
        assert set.union(*parts) == {column.key for column in sheet.columns}, name
        assert max(map(len, parts)) <= 14, f"{name} is wide"


def test_our_scores_over_training_are_of_the_length_of_the_row(tmp_path: Path):
    stage = evaluate_stage(progress_row("DiCo-B"), stopped(100_000), 0)
    values = dict(fid=50.0, fid_corrected=49.0, sfid=9.0, precision=0.5, recall=0.5)
    Store(tmp_path).append(stage, "done", values | {"is": 20.0}, PROVENANCE)
    sheet = SHEETS["table7"](commit_records(tmp_path))
    ours = zip(texts(sheet, "model"), texts(sheet, "steps"), texts(sheet, "ours_fid"), strict=True)
    assert [row for row in ours if row[2] != "-"] == [("DiCo-B", "100000", "50.00")]


@pytest.mark.slow
def test_tables_load_no_torch_and_no_plots():
    code = """
        from analysis.claims.judge import claims_sheet
        from analysis.evidence.page import evidence_page
        from analysis.query import ReferenceStore
        from analysis.tables.paper import SHEETS
        store = ReferenceStore()
        for make_sheet in SHEETS.values():
            make_sheet(store)
        claims_sheet(store)
        evidence_page(store)
    """
    assert not {"torch", "timm", "sklearn", "matplotlib", "pandas"} & loaded_modules(code)
