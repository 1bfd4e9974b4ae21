"""Sheets from synthetic records: what a cell may say, and that every format says it."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.ablation import TABLE_3, TABLE_4, TABLE_5
from experiments.declared.protocols import DIGITS, IMAGENET256, PROTOCOLS
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.reporting.statistics import OUTLIERS, made_by_few
from experiments.engine.reporting.tables import comparison_sheet, main_sheet
from experiments.engine.scoring import metrics
from experiments.engine.specs.rows import Row
from experiments.engine.specs.stages import cost_stage, evaluate_stage, timing_stage, train_stage

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


def scored(store: Store, row: Row, seeds: dict[int, dict[str, Any]]) -> None:
    for seed, values in seeds.items():
        store.append(evaluate_stage(row, DIGITS, seed), "done", values, PROVENANCE)


def reference(folder: Path, *rows: Row, spread: float = 0.1) -> Store:
    """A store whose committed records hold three seeds a row, fd 10 give or take `spread`."""
    store = Store(folder)
    for row in rows:
        scored(
            store,
            row,
            {
                seed: scores(
                    10 + spread * (seed - 1),
                    is_digits=8 + spread * (seed - 1),
                    recall_digits=0.8 + spread * seed / 100,
                )
                for seed in range(3)
            },
        )
    (folder / "records").rename(folder / "reference")
    store.refresh()
    return store


def cells(sheet: Sheet, row: int) -> dict[tuple[str, str], str]:
    return dict(zip(sheet.columns, (cell.text() for cell in sheet.rows[row]), strict=True))


def column(sheet: Sheet, name: str) -> list[str]:
    (index,) = [i for i, (_, other) in enumerate(sheet.columns) if other == name]
    return [row[index].text() for row in sheet.rows]


def main(store: Store, seeds: tuple[int, ...] = (0,), **changes: Any) -> Sheet:
    return main_sheet(
        **(
            dict(table=TABLE_4, rows=ROWS, protocol=DIGITS, seeds=seeds, device="cpu", store=store)
            | changes
        )
    )


def compared(store: Store, seeds: tuple[int, ...] = (0,)) -> list[str]:
    return column(comparison_sheet(TABLE_4, ROWS, DIGITS, seeds, "cpu", store), "reproduced")


@pytest.mark.parametrize(
    "cell, text",
    [
        (Cell(), "-"),
        (Cell(math.nan), "-"),
        (Cell(1.234, 0.056), "1.23 ±0.06"),
        (Cell(1.234, math.nan, 1), "1.2"),
        (Cell(0.0), "0.00"),
        (Cell(3.0, label="failed"), "failed"),
    ],
)
def test_what_a_cell_says(cell: Cell, text: str):
    assert cell.text() == text


def test_counts_and_scores_stand_in_their_columns(tmp_path: Path):
    store = Store(tmp_path)
    store.append(cost_stage(ROWS[0]), "done", COUNTS, PROVENANCE)
    store.append(
        timing_stage(ROWS[0], ROWS[0], "cpu"),
        "done",
        {
            "images_per_s": 12.34,
            "images_per_s_spread": 0.56,
            "relative": 1.0,
            "relative_spread": 0.0,
        },
        PROVENANCE,
    )
    scored(store, ROWS[0], {0: scores(12.345)})
    found = cells(main(store), 0)
    assert (found["params, M", "ours"], found["Gflops", "ours"], found["Gflops", "core"]) == (
        "33.1",
        "4.25",
        "4.12",
    )
    assert (
        found["throughput, this machine", "img/s"],
        found["paper, A100", "img/s"],
        found["paper, A100", "rel."],
    ) == ("12.3 ±0.6", "1695.73", "1.00")
    assert (
        found["digits (this machine, seed 0)", "fd_digits"] == "12.3 ±0.2"
        and found["paper: ImageNet 256, 400K steps", "FID"] == "49.97"
    )
    assert {
        cells(main(store), 1)["params, M", "ours"],
        cells(main(store), 1)["digits (this machine, seed 0)", "fd_digits"],
    } == {"-"}


@pytest.mark.parametrize(
    "stage, where", [(0, "ours"), (1, "img/s"), (2, "fd_digits"), (3, "fd_digits")]
)
def test_a_stage_that_failed_is_shown_in_its_columns_and_explained(
    stage: int, where: str, tmp_path: Path
):
    row = ROWS[1]
    spec = (
        cost_stage(row),
        timing_stage(row, ROWS[0], "cpu"),
        train_stage(row, DIGITS, 0),
        evaluate_stage(row, DIGITS, 0),
    )[stage]
    store = Store(tmp_path)
    store.append(spec, "failed", {}, PROVENANCE, "ValueError: it broke")
    sheet = main(store)
    assert "failed" in {text for (_, name), text in cells(sheet, 1).items() if name == where}
    assert "failed" not in cells(sheet, 0).values()
    assert [
        note
        for note in sheet.notes
        if note.startswith(row.label) and note.endswith("failed: ValueError: it broke")
    ]
    store.append(
        spec, "done", COUNTS | scores(1.0) | {"images_per_s": 1.0, "relative": 1.0}, PROVENANCE
    )
    assert "failed" not in cells(main(store), 1).values()


def test_seeds_are_averaged_with_the_error_of_their_mean(tmp_path: Path):
    store = Store(tmp_path)
    scored(store, ROWS[0], {0: scores(9.0), 1: scores(10.0), 2: scores(11.0)})
    assert column(main(store, (0, 1, 2)), "fd_digits")[0] == "10.0 ±0.6"
    assert column(main(store, (1,)), "fd_digits")[0] == "10.0 ±0.2"


def test_a_mean_over_fewer_seeds_than_asked_for_says_so(tmp_path: Path):
    store = Store(tmp_path)
    scored(store, ROWS[0], {0: scores(9.0), 1: scores(10.0)})
    sheet = main(store, (0, 1, 2))
    assert column(sheet, "fd_digits")[0] == "9.5 ±0.5"
    assert any("2 of 3 seeds" in text for text in [*column(sheet, "row"), *sheet.notes])


def test_one_seed_is_compared_with_the_spread_of_the_reference(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    scored(store, ROWS[0], {0: scores(10.05)})
    scored(store, ROWS[1], {0: scores(14.0)})
    assert compared(store) == ["yes", "no: fd_digits", "-"]


def test_every_score_that_is_off_is_named(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    scored(store, ROWS[0], {0: scores(2.0, is_digits=3.0, recall_digits=0.1)})
    assert compared(store)[0] == "no: fd_digits, is_digits, recall_digits"


def test_nothing_is_reproduced_where_the_spread_is_unknown_or_the_score_is_no_number(
    tmp_path: Path,
):
    alone = Store(tmp_path / "alone")
    scored(alone, ROWS[0], {0: scores(10.0)})
    (tmp_path / "alone" / "records").rename(tmp_path / "alone" / "reference")
    scored(alone, ROWS[0], {0: scores(10.0)})
    assert compared(alone) == ["spread unknown", "-", "-"]
    repeated = reference(tmp_path / "repeated", *ROWS)
    scored(repeated, ROWS[0], {0: scores(math.nan)})
    assert compared(repeated)[0] == "no: fd_digits"


def test_a_reference_is_no_record_of_this_machine(tmp_path: Path):
    store = reference(tmp_path, *ROWS)
    assert set(column(main(store), "fd_digits")) == {"-"} and compared(store) == ["-"] * 3
    assert column(main(store, (0, 1, 2), source=store.reference), "fd_digits") == ["10.0 ±0.1"] * 3


@pytest.mark.parametrize(
    "fd, verdict",
    [(5.0, "better: GELU->ReLU"), (20.0, "worse: GELU->ReLU"), (10.02, "not resolved: GELU->ReLU")],
)
def test_a_difference_is_resolved_against_the_spread_of_the_reference(
    fd: float, verdict: str, tmp_path: Path
):
    store = reference(tmp_path, *ROWS)
    scored(store, ROWS[0], {0: scores(10.0)})
    scored(store, ROWS[1], {0: scores(fd)})
    (note,) = [note for note in main(store).notes if note.startswith("fd_digits against DiCo-S")]
    assert "the reference's pooled spread" in note and note.endswith(f"{verdict}.")


def test_a_difference_is_resolved_against_the_spread_of_these_runs(tmp_path: Path):
    store = Store(tmp_path)
    for row, fd in zip(ROWS, (10.0, 5.0, 10.1), strict=True):
        scored(store, row, {seed: scores(fd + 0.1 * seed) for seed in range(3)})
    (note,) = [
        note for note in main(store, (0, 1, 2)).notes if note.startswith("fd_digits against DiCo-S")
    ]
    assert "these runs' pooled spread" in note and note.endswith(
        "better: GELU->ReLU; not resolved: DWC 5x5."
    )


def test_records_of_a_changed_tree_are_marked(tmp_path: Path):
    store = Store(tmp_path)
    store.append(
        evaluate_stage(ROWS[0], DIGITS, 0), "done", scores(1.0), PROVENANCE | {"dirty": True}
    )
    assert any("uncommitted changes" in note for note in main(store).notes)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("table", [TABLE_3, TABLE_4, TABLE_5], ids=lambda table: str(table.number))
def test_every_table_prints_without_records_under_every_protocol(
    table: Any, protocol: Any, tmp_path: Path
):
    sheet = main_sheet(table, (*table.rows, *table.outside), protocol, (0,), "cpu", Store(tmp_path))
    assert column(sheet, "row") == [row.label for row in (*table.rows, *table.outside)]
    assert all(len(row) == len(sheet.columns) for row in sheet.rows) and not list(
        tmp_path.iterdir()
    )
    assert ({"FID-50K", "FID-50K, no bias"} <= {name for _, name in sheet.columns}) == (
        protocol.features == "inception" and not table.counts_only
    )


def test_csv_keeps_every_digit_and_every_error(tmp_path: Path):
    store = Store(tmp_path)
    values = scores(1 / 3, fd_digits_se=2 / 3)
    scored(store, ROWS[0], {0: values})
    store.append(cost_stage(ROWS[0]), "done", COUNTS, PROVENANCE)
    names, *rows = csv.reader(io.StringIO(render([main(store)], "csv")))
    first = dict(zip(names, rows[0], strict=True))
    assert len(names) == len(set(names)) and len(rows) == len(ROWS)
    assert (
        float(first["digits (this machine, seed 0): fd_digits"]) == 1 / 3
        and float(first["digits (this machine, seed 0): fd_digits error"]) == 2 / 3
    )
    assert float(first["Gflops: ours"]) == COUNTS["macs_torchprofile"] / 1e9
    assert dict(zip(names, rows[1], strict=True))["Gflops: ours"] == ""


def test_a_distance_that_few_images_make_is_noted(tmp_path: Path):
    """500 scores of which one is far away have an error of the size of what it adds; the note follows the record, not the row."""
    store = Store(tmp_path)
    scored(store, ROWS[0], {0: scores(100.0, fd_digits_se=98.4)})
    scored(store, ROWS[1], {0: scores(100.0, fd_digits_se=14.0)})
    (note,) = [note for note in main(store).notes if "few images" in note]
    assert note.startswith(f"{ROWS[0].label}, sampling error 98% of fd_digits: ")
    assert (
        made_by_few(
            "fd_digits",
            {"a": [{"fd_digits": 0.0, "fd_digits_se": 1.0}], "b": [], "c": [{"fd_digits": 4.0}]},
        )
        == []
    )


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_one_image_far_away_makes_the_error_as_large_as_the_distance(far: float):
    """500 images and 900 of the truth, 7 features: what the threshold of the note rests on."""
    drawn = np.random.default_rng(0)
    fake, real = drawn.normal(0.2, 1, (500, 7)), metrics.Moments(7)
    fake[123, 0] += far
    moments = metrics.Moments(7)
    moments.update(fake)
    real.update(drawn.normal(0, 1, (900, 7)))
    share = metrics.frechet_se(fake, moments, real) / metrics.frechet(moments, real)
    assert (share > OUTLIERS) == (far > 0) and (not far or 0.8 < share < 1.2)


def test_csv_is_rectangular_and_holds_the_notes_of_the_markdown(tmp_path: Path):
    for sheet in (
        main(Store(tmp_path)),
        HARD,
        Sheet("nothing", [("", "row")], [], ["a note, quoted"]),
    ):
        names, first, *others = csv.reader(io.StringIO(render([sheet], "csv")))
        assert (
            {len(row) for row in (first, *others)} == {len(names)}
            and names[-1] == "notes"
            and not any(row[-1] for row in others)
        )
        assert (
            first[-1].splitlines() == sheet.notes
            and all(f"- {note}" in render([sheet], "markdown") for note in sheet.notes)
            and sheet.notes
        )


HARD = Sheet(
    "50% & more_of it",
    [("", "row"), ("a_b & c", "x"), ("a_b & c", "y#")],
    [[Cell(label="A->B & 5%"), Cell(1.5, 0.25), Cell(label="failed")]],
    ["100% sure_thing"],
)


def test_latex_holds_no_bare_special_characters():
    text = render([HARD], "latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    bare = "".join(body)
    for escaped in ("\\\\", "\\&", "\\%", "\\_", "\\#", "$\\pm$", "$\\to$"):
        bare = bare.replace(escaped, "")
    assert "100\\% sure\\_thing" in "".join(body)
    assert (
        not set("%_#$^~") & set(bare)
        and bare.count("{") == bare.count("}")
        and bare.count("&") == 1 + 2 + 2
    )
    assert (
        text.index("\\begin{tabular}{lrr}") < text.index("\\midrule") < text.index("\\end{tabular}")
    )


def test_markdown_has_a_line_a_row_and_the_notes():
    lines = render([HARD], "markdown").splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {
        4
    } and f"- {HARD.notes[0]}" in lines


def test_text_lines_up_and_names_every_column():
    title, _, groups, names, rule, row, *_ = render([HARD], "text").splitlines()
    assert (
        title == HARD.title
        and groups.index("a_b") > groups.index("|") - 1
        and names.split() == ["row", "|", "x", "y#"]
    )
    assert names.index("|") == groups.index("|") and set(rule) == {"-"} and len(rule) >= len(row)


def test_a_report_loads_no_torch():
    code = (
        "import sys; from pathlib import Path; from experiments.ablation import TABLES; from experiments.engine.reporting.render import FORMATS, render; from experiments.engine.reporting.tables import *; "
        "from experiments.engine.records.store import Store; from experiments.declared.protocols import DIGITS; t = TABLES[4]; a = (t, t.rows, DIGITS, range(3), 'cpu', Store()); "
        "[render([main_sheet(*a), comparison_sheet(*a)], form) for form in FORMATS]; print(sorted({'torch', 'timm', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_table_of_another_protocol_has_its_own_scores(tmp_path: Path):
    sheet = main(Store(tmp_path), protocol=IMAGENET256)
    assert not any("digits" in "".join(column) for column in sheet.columns) and not any(
        "fd_digits" in note for note in sheet.notes
    )
    renamed = main(Store(tmp_path), protocol=replace(DIGITS, name="other"))
    assert any(group.startswith("other (this machine") for group, _ in renamed.columns)
