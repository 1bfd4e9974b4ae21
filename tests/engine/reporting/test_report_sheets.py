"""The report of a table: gaps, failures, the reference beside it, and every format."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from experiments.ablation import TABLES
from experiments.declared.protocols import DIGITS_WHOLE
from experiments.engine.records.store import Store
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import cost_stage, evaluate_stage, timing_stage, train_stage
from tests.support.sheets import labelled, note_about, texts

TABLE = TABLES[4]
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}
COUNTS = {"params_trainable": 33e6, "macs_torchprofile": 4.25e9, "macs_core": 4.2e9}
SPEED = {"images_per_s": 20.0, "relative": 1.0}


def write_records(store: Store, seeds: int, shift: float = 0.0) -> None:
    """Write records of Table 4: fd 10 with some spread over seeds, and `shift` more in row two."""
    for number, row in enumerate(TABLE.rows):
        store.append(cost_stage(row), "done", COUNTS, PROVENANCE)
        store.append(timing_stage(row, TABLE.baseline, "cpu"), "done", SPEED, PROVENANCE)

        # Every seed has scores of its own.
        of_row = 10 + shift if number == 1 else 10
        for seed in range(seeds):
            values = {
                "fd_digits": of_row + 0.1 * ((seed + number) % 3),
                "is_digits": 8 + 0.01 * seed,
                "precision_digits": 0.6,
                "recall_digits": 0.8 + 0.001 * seed,
                "agreement": 0.9,
            }
            store.append(evaluate_stage(row, DIGITS_WHOLE, seed), "done", values, PROVENANCE)
    store.refresh()


def make_reference(store: Store) -> None:
    """Let the records of this machine be the reference."""
    (store.root / "records").rename(store.root / "reference")
    store.refresh()


def sheets(store: Store, seeds: int = 1) -> list[Sheet]:
    """The table of this machine, and its comparison with the reference."""
    return report_sheets(Selection(TABLE, TABLE.rows, DIGITS_WHOLE, range(seeds), "cpu"), store)


def test_what_is_not_recorded_is_a_gap_beside_what_is_published(tmp_path: Path):
    row = labelled(sheets(Store(tmp_path))[0], TABLE.rows[0].label)
    assert row["params"] == "-"
    assert row["gflops_paper"] == "4.25"
    assert row["gflops"] == "-"
    assert row["gflops_core"] == "-"


def test_a_failure_is_shown_in_its_row_with_its_reason(tmp_path: Path):
    store = Store(tmp_path)
    stage = train_stage(TABLE.rows[2], DIGITS_WHOLE, 0)
    store.append(stage, "failed", {}, PROVENANCE, "ValueError: the loss is nan after 50 steps")
    main, _ = sheets(store)
    assert "failed" in labelled(main, TABLE.rows[2].label).values()
    assert "failed" not in labelled(main, TABLE.rows[1].label).values()
    assert note_about(main, "the loss is nan")


@pytest.mark.parametrize("shift, verdict", [(0.0, "yes"), (5.0, "no: fd_digits")])
def test_a_reference_is_shown_beside_and_never_instead(shift: float, verdict: str, tmp_path: Path):
    store = Store(tmp_path)
    write_records(store, seeds=3)
    make_reference(store)
    main, comparison = sheets(store)
    assert texts(main, "fd_digits")[0] == "-"
    assert set(texts(comparison, "reproduced")) == {"-"}

    # Scores of this machine get a verdict; the second row is shifted.
    write_records(store, seeds=1, shift=shift)
    _, comparison = sheets(store)
    assert texts(comparison, "reproduced")[:3] == ["yes", verdict, "yes"]


def test_a_difference_is_resolved_only_beyond_the_spread_over_seeds(tmp_path: Path):
    # One seed tells nothing of the spread.
    alone = Store(tmp_path / "alone")
    write_records(alone, seeds=1, shift=5.0)
    assert note_about(sheets(alone)[0], "can be called resolved")

    # With three, the shifted row is worse and the others are not told apart.
    repeated = Store(tmp_path / "repeated")
    write_records(repeated, seeds=3, shift=5.0)
    note = note_about(sheets(repeated, 3)[0], "fd_digits against DiCo-S")
    assert "worse: GELU->ReLU;" in note
    assert "not resolved: DWC 5x5" in note


# ---- Formats


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The table in every format."""
    store = Store(tmp_path_factory.mktemp("results"))
    write_records(store, seeds=1)
    main, _ = sheets(store)
    return {form: render([main], form) for form in FORMATS}


@pytest.mark.parametrize("form", ["text", "markdown", "csv"])
def test_every_format_names_every_row(form: str, printed: dict[str, str]):
    for row in TABLE.rows:
        assert row.label in printed[form]


def test_csv_holds_exact_numbers_in_equal_lines(printed: dict[str, str]):
    rows = list(csv.reader(io.StringIO(printed["csv"])))
    assert len({len(row) for row in rows}) == 1
    assert rows[1][rows[0].index("Gflops: ours")] == repr(4.25)


def test_latex_closes_what_it_opens(printed: dict[str, str]):
    assert printed["latex"].count("{") == printed["latex"].count("}")
    assert printed["latex"].count("\\\\") == len(TABLE.rows) + 2


def test_lines_of_markdown_have_equally_many_cells(printed: dict[str, str]):
    lines = [line for line in printed["markdown"].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
