"""The tables of synthetic records: what stands where, and which differences are called real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.ablation import TABLE_3, TABLE_4, TABLE_5
from experiments.declared.protocols import DIGITS_WHOLE, IMAGENET256, PROTOCOLS
from experiments.engine.records.store import RecordFolder, Store
from experiments.engine.reporting.caveats import OUTLIERS, outlier_caveats
from experiments.engine.reporting.comparison import comparison_sheet
from experiments.engine.reporting.sheet import NoteKind, Sheet
from experiments.engine.reporting.tables import main_sheet, report_sheets
from experiments.engine.scoring.frechet import frechet, frechet_se
from experiments.engine.scoring.moments import Moments
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import (
    Protocol,
    cost_stage,
    evaluate_stage,
    timing_stage,
    train_stage,
)
from experiments.main_results import TABLE_1
from tests.support.imports import loaded_modules
from tests.support.sheets import labelled, note_about, note_texts, texts

ROWS = TABLE_4.rows[:3]
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}
COUNTS = {
    "params_trainable": 33_123_456,
    "macs_torchprofile": 4_249_876_543,
    "macs_core": 4_123_456_789,
}


def scores(fd: float, **changes: float) -> dict[str, Any]:
    shares = {"is_digits": 8.0, "precision_digits": 0.6, "recall_digits": 0.8, "agreement": 0.9}
    return {"fd_digits": fd, "fd_digits_se": 0.25} | shares | changes


def score(store: Store, row: Row, seeds: dict[int, dict[str, Any]]) -> None:
    for seed, values in seeds.items():
        store.append(evaluate_stage(row, DIGITS_WHOLE, seed), "done", values, PROVENANCE)


def repeated(spread: float = 0.1) -> dict[int, dict[str, Any]]:
    """Three seeds: fd 10 give or take `spread`."""
    return {
        seed: scores(
            10 + spread * (seed - 1),
            is_digits=8 + spread * (seed - 1),
            recall_digits=0.8 + spread * seed / 100,
        )
        for seed in range(3)
    }


def reference(folder: Path, *rows: Row) -> Store:
    """A store whose committed records hold three seeds per row."""
    store = Store(folder)
    for row in rows:
        score(store, row, repeated())
    (folder / "records").rename(folder / "reference")
    store.refresh()
    return store


def selection(
    seeds: Sequence[int] = (0,), table: Table = TABLE_4, protocol: Protocol = DIGITS_WHOLE
) -> Selection:
    rows = ROWS if table is TABLE_4 else table.rows
    return Selection(table, rows, protocol, seeds, "cpu")


def main(
    store: Store, seeds: Sequence[int] = (0,), folder: RecordFolder | None = None, **changes: Any
) -> Sheet:
    return main_sheet(selection(seeds, **changes), store, folder or store.here)


def verdicts(store: Store) -> list[str]:
    return texts(comparison_sheet(selection(), store), "reproduced")


def test_counts_speed_and_scores_stand_in_their_columns(tmp_path: Path):
    """A row shows what is recorded of it beside the paper's numbers, and another row gaps."""
    store = Store(tmp_path)
    store.append(cost_stage(ROWS[0]), "done", COUNTS, PROVENANCE)
    speed = {"images_per_s": 12.34, "images_per_s_spread": 0.56, "relative": 1.0}
    store.append(timing_stage(ROWS[0], ROWS[0], "cpu"), "done", speed, PROVENANCE)
    score(store, ROWS[0], {0: scores(12.345)})
    sheet = main(store)
    first, second = (labelled(sheet, row.label) for row in ROWS[:2])

    # The row with records.
    counts = ("params", "gflops", "gflops_core")
    assert [first[key] for key in counts] == ["33.1", "4.25", "4.12"]
    speeds = ("img_s", "relative", "paper_img_s", "paper_relative")
    assert [first[key] for key in speeds] == ["12.3 ±0.6", "1.00", "1695.73", "1.00"]
    assert (first["fd_digits"], first["paper_fid"]) == ("12.3 ±0.2", "49.97")

    # The row without.
    assert {second[key] for key in (*counts, "img_s", "fd_digits")} == {"-"}
    assert sheet.column("fd_digits").group == "digits_whole (this machine, seed 0)"


def test_less_than_one_image_a_second_has_two_decimals(tmp_path: Path):
    store = Store(tmp_path)
    speed = {"images_per_s": 0.1234, "images_per_s_spread": 0.0156, "relative": 0.5}
    store.append(timing_stage(ROWS[0], ROWS[0], "cpu"), "done", speed, PROVENANCE)
    assert labelled(main(store), ROWS[0].label)["img_s"] == "0.12 ±0.02"


@pytest.mark.parametrize(
    "stage, key", [(0, "gflops"), (1, "img_s"), (2, "agreement"), (3, "agreement")]
)
def test_a_stage_that_failed_is_shown_in_its_columns_and_explained(
    stage: int, key: str, tmp_path: Path
):
    """A failure stands in the columns of its stage until a later record takes its place."""
    row = ROWS[1]
    stages = (
        cost_stage(row),
        timing_stage(row, ROWS[0], "cpu"),
        train_stage(row, DIGITS_WHOLE, 0),
        evaluate_stage(row, DIGITS_WHOLE, 0),
    )
    store = Store(tmp_path)
    store.append(stages[stage], "failed", {}, PROVENANCE, "ValueError: it broke")

    # The error is a note.
    sheet = main(store)
    assert labelled(sheet, row.label)[key] == "failed"
    assert "failed" not in labelled(sheet, ROWS[0].label).values()
    (note,) = note_texts(sheet, NoteKind.FAILURE)
    assert note.startswith(row.label)
    assert note.endswith("failed: ValueError: it broke")

    # A second run succeeds.
    values = COUNTS | scores(1.0) | {"images_per_s": 1.0, "relative": 1.0}
    store.append(stages[stage], "done", values, PROVENANCE)
    assert "failed" not in labelled(main(store), row.label).values()


def test_seeds_are_averaged_with_the_error_of_their_mean(tmp_path: Path):
    store = Store(tmp_path)
    score(store, ROWS[0], {0: scores(9.0), 1: scores(10.0), 2: scores(11.0)})
    assert texts(main(store, (0, 1, 2)), "fd_digits")[0] == "10.0 ±0.6"
    assert texts(main(store, (1,)), "fd_digits")[0] == "10.0 ±0.2"


def test_a_mean_over_fewer_seeds_than_asked_for_says_so(tmp_path: Path):
    store = Store(tmp_path)
    score(store, ROWS[0], {0: scores(9.0), 1: scores(10.0)})
    sheet = main(store, (0, 1, 2))
    assert texts(sheet, "fd_digits")[0] == "9.5 ±0.5"
    assert note_texts(sheet, NoteKind.SEEDS) == [f"2 of 3 seeds: {ROWS[0].label}."]


def test_one_seed_is_compared_with_the_spread_of_the_reference(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    score(store, ROWS[0], {0: scores(10.05)})
    score(store, ROWS[1], {0: scores(14.0)})
    assert verdicts(store) == ["yes", "no: fd_digits", "-"]


def test_every_score_that_is_off_is_named(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    score(store, ROWS[0], {0: scores(2.0, is_digits=3.0, recall_digits=0.1)})
    assert verdicts(store)[0] == "no: fd_digits, is_digits, recall_digits"


def test_nothing_is_reproduced_if_the_spread_is_unknown(tmp_path: Path):
    store = Store(tmp_path)
    score(store, ROWS[0], {0: scores(10.0)})
    (tmp_path / "records").rename(tmp_path / "reference")
    score(store, ROWS[0], {0: scores(10.0)})
    assert verdicts(store) == ["spread unknown", "-", "-"]


def test_a_score_that_is_no_number_is_not_reproduced(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    score(store, ROWS[0], {0: scores(math.nan)})
    assert verdicts(store)[0] == "no: fd_digits"


def test_a_reference_is_no_record_of_this_machine(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    assert set(texts(main(store), "fd_digits")) == {"-"} and verdicts(store) == ["-"] * 3
    committed = main(store, (0, 1, 2), store.reference)
    assert texts(committed, "fd_digits") == ["10.0 ±0.1"] * 3
    assert committed.column("fd_digits").group == "digits_whole (reference, 3 seeds)"


@pytest.mark.parametrize(
    "fd, verdict",
    [(5.0, "better: GELU->ReLU"), (20.0, "worse: GELU->ReLU"), (10.02, "not resolved: GELU->ReLU")],
)
def test_a_difference_is_resolved_against_the_spread_of_the_reference(
    fd: float, verdict: str, tmp_path: Path
):
    store = reference(tmp_path, *ROWS)
    score(store, ROWS[0], {0: scores(10.0)})
    score(store, ROWS[1], {0: scores(fd)})
    note = note_about(main(store), "fd_digits against DiCo-S")
    assert f": {verdict}. " in note and "spread over seeds of the reference" in note


def test_a_difference_is_resolved_against_the_spread_of_these_runs(tmp_path: Path):
    store = Store(tmp_path)
    for row, fd in zip(ROWS, (10.0, 5.0, 10.1), strict=True):
        score(store, row, {seed: scores(fd + 0.1 * seed) for seed in range(3)})
    note = note_about(main(store, (0, 1, 2)), "fd_digits against DiCo-S")
    assert "better: GELU->ReLU; not resolved: DWC 5x5. " in note
    assert "spread over seeds of these runs" in note


def test_no_difference_is_resolved_without_repeated_seeds(tmp_path: Path):
    store = Store(tmp_path)
    for row in ROWS:
        score(store, row, {0: scores(10.0)})
    assert "there is one seed and no reference" in note_about(main(store), "called resolved")


def test_a_network_of_several_rows_has_its_scores_once(tmp_path: Path):
    """DiCo-S, B and L are one small network on digits; its one run stands for all of them."""
    store = Store(tmp_path)
    rows = [TABLE_1.row(label) for label in ("DiT-S/2", "DiCo-S", "DiCo-B", "DiCo-L")]
    for row in rows[:2]:
        score(store, row, {seed: scores(10.0 + seed) for seed in range(3)})
    table, families, _ = report_sheets(
        Selection(TABLE_1, rows, DIGITS_WHOLE, (0, 1, 2), "cpu"), store
    )
    assert not table.has("fd_digits") and len(table.rows) == 4
    assert texts(families, "row") == ["DiT-S/2", "DiCo-S"]
    assert texts(families, "stands_for") == ["DiT-S/2", "DiCo-S, DiCo-B, DiCo-L"]
    assert texts(families, "fd_digits") == ["11.0 ±0.6"] * 2


def test_rows_of_their_own_networks_have_their_scores_in_the_table(tmp_path: Path):
    table, comparison = report_sheets(selection(), Store(tmp_path))
    assert table.has("fd_digits") and comparison.has("reproduced")


def test_records_of_a_changed_tree_are_marked(tmp_path: Path):
    store = Store(tmp_path)
    stage = evaluate_stage(ROWS[0], DIGITS_WHOLE, 0)
    store.append(stage, "done", scores(1.0), PROVENANCE | {"dirty": True})
    assert note_about(main(store), "uncommitted changes")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("table", [TABLE_3, TABLE_4, TABLE_5], ids=lambda table: str(table.number))
def test_every_table_prints_without_records_under_every_protocol(
    table: Table, protocol: Protocol, tmp_path: Path
):
    rows = (*table.rows, *table.outside)
    store = Store(tmp_path)
    sheet = main_sheet(Selection(table, rows, protocol, (0,), "cpu"), store, store.here)
    assert texts(sheet, "row") == [row.label for row in rows]
    assert not list(tmp_path.iterdir())
    titles = {column.title for column in sheet.columns}
    has_fid = protocol.features == "inception" and not table.counts_only
    assert ({"FID-50K", "FID-50K, no bias"} <= titles) == has_fid


def test_a_distance_that_few_images_make_is_noted(tmp_path: Path):
    """500 scores of which one is far away have an error of the size of what it adds."""
    store = Store(tmp_path)
    score(store, ROWS[0], {0: scores(100.0, fd_digits_se=98.4)})
    score(store, ROWS[1], {0: scores(100.0, fd_digits_se=14.0)})
    note = note_about(main(store), "few images")
    assert note.startswith(f"{ROWS[0].label}: the sampling error is 98% of fd_digits. ")


def test_a_distance_of_zero_or_without_an_error_is_not_made_by_few():
    values = {"a": [{"fd": 0.0, "fd_se": 1.0}], "b": [], "c": [{"fd": 4.0}]}
    assert outlier_caveats("fd", values) == []


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_one_image_far_away_makes_the_error_as_large_as_the_distance(far: float):
    """500 images and 900 of the truth, 7 features: what the threshold of the note rests on."""
    generator = np.random.default_rng(0)
    fake, real = generator.normal(0.2, 1, (500, 7)), Moments(7)
    fake[123, 0] += far
    moments = Moments(7)
    moments.update(fake)
    real.update(generator.normal(0, 1, (900, 7)))
    share = frechet_se(fake, moments, real) / frechet(moments, real)
    assert (share > OUTLIERS) == (far > 0) and (not far or 0.8 < share < 1.2)


def test_a_table_of_another_protocol_has_its_own_scores(tmp_path: Path):
    sheet = main(Store(tmp_path), protocol=IMAGENET256)
    assert not any("digits" in column.full_title for column in sheet.columns)
    assert not any("fd_digits" in text for text in note_texts(sheet))
    renamed = main(Store(tmp_path), protocol=replace(DIGITS_WHOLE, name="other"))
    assert renamed.column("fd_digits").group == "other (this machine, seed 0)"


def test_a_report_loads_no_torch():
    """All forms of a report are printed without heavy libraries."""
    code = """
        from experiments.ablation import TABLES
        from experiments.declared.protocols import DIGITS_WHOLE
        from experiments.engine.records.store import Store
        from experiments.engine.reporting.render import FORMATS, render
        from experiments.engine.reporting.tables import report_sheets
        from experiments.engine.specs.selection import Selection
        table = TABLES[4]
        sheets = report_sheets(Selection(table, table.rows, DIGITS_WHOLE, [0], "cpu"), Store())
        for form in FORMATS:
            render(sheets, form)
    """

    # In a process of its own.
    heavy = {"torch", "timm", "sklearn", "matplotlib", "pandas"}
    assert not heavy & loaded_modules(code)
