"""Tables 1, 2, 8 and 9 as they are printed: ours beside what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.declared.protocols import DIGITS_WHOLE, PROTOCOLS
from experiments.engine.cli import main
from experiments.engine.records.store import Store
from experiments.engine.reporting.tables import main_sheet, report_sheets
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import cost_stages, evaluate_stage
from experiments.main_results import ADM_U, DIMSUM_L, DIT_XL, SIT_XL, TABLE_8, TABLES
from tests.support.sheets import note_texts

PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}
SCORES = {
    "fd_digits": 1.0,
    "is_digits": 8.0,
    "precision_digits": 0.5,
    "recall_digits": 0.5,
    "agreement": 0.9,
}


def cells(store: Store, table: Table) -> dict[str, dict[str, str]]:
    """The printed cells of a table by row and by title, which follows its group."""
    sheet = main_sheet(Selection(table, table.rows, DIGITS_WHOLE, (0,), "cpu"), store, store.here)
    return {
        row["row"].text(): {
            f"{column.group} {column.title}".strip(): cell.text(column.digits)
            for column, cell in sheet.cells(row)
        }
        for row in sheet.rows
    }


def test_systems_are_counted_whole(tmp_path: Path):
    """ADM-U's counts are the sums over its base and its upsampler."""
    store = Store(tmp_path)
    base, upsampler = cost_stages(ADM_U)
    macs = {"macs_torchprofile": 10**11, "macs_core": 10**11 - 1}
    store.append(base, "done", {"params_trainable": 300_000_000} | macs, PROVENANCE)
    store.append(upsampler, "done", {"params_trainable": 311_000_000} | macs, PROVENANCE)

    row = cells(store, TABLE_8)["ADM-U"]
    assert row["params, M ours"] == "611.0"
    assert row["Gflops ours"] == "200.00"
    assert row["params, M paper"] == "608M"


def test_a_system_without_a_network_has_only_published_numbers(tmp_path: Path):
    row = cells(Store(tmp_path), TABLE_8)["MAR-H"]
    printed = {name for name, text in row.items() if text != "-"}
    scores = {f"paper: ImageNet 256 {score}" for score in ("FID", "IS", "P", "R")}
    assert printed == {"row", "type", "params, M paper"} | scores
    assert row["paper: ImageNet 256 FID"] == "1.55"
    assert row["type"] == "AR"


@pytest.fixture
def evaluated(tmp_path: Path) -> Store:
    """Scores of three rows, of which one took another number of evaluations."""
    store = Store(tmp_path)
    for row, nfe in ((SIT_XL, 50.0), (DIT_XL, 50.0), (DIMSUM_L, 62.375)):
        store.append(
            evaluate_stage(row, DIGITS_WHOLE, 0), "done", SCORES | {"nfe": nfe}, PROVENANCE
        )
    return store


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([SIT_XL, DIT_XL], ["Network evaluations per image: 50."]),
        (
            TABLE_8.rows,
            ["Network evaluations per image: 50: DiT-XL/2, SiT-XL; 62.38: DiMSUM-L/2."],
        ),
        ([ADM_U], []),
    ],
    ids=["equal", "different", "none"],
)
def test_evaluations_per_image_are_noted_by_row_where_they_differ(
    rows: list[Row], expected: list[str], evaluated: Store
):
    sheets = report_sheets(Selection(TABLE_8, rows, DIGITS_WHOLE, (0,), "cpu"), evaluated)
    notes = [text for sheet in sheets for text in note_texts(sheet)]
    assert [text for text in notes if "evaluations" in text] == expected


SPEED = {"paper, A100 rel.", "paper: ImageNet 256 steps", "paper: ImageNet 256 guided"}
SIZES = {"type", "params, M paper"}


@pytest.mark.parametrize("number, present, absent", [(1, SPEED, SIZES), (9, SIZES, SPEED)])
def test_a_table_has_the_columns_that_were_published(
    number: int, present: set[str], absent: set[str], tmp_path: Path
):
    columns = set(next(iter(cells(Store(tmp_path), TABLES[number]).values())))
    assert present <= columns
    assert not absent & columns


def test_a_papers_own_recipes_are_for_its_own_resolution(capsys: pytest.CaptureFixture[str]):
    arguments = ["--table", "2", "--protocol", "imagenet256_own", "--dry-run"]
    assert main(TABLES, PROTOCOLS, None, arguments) == 2
    assert capsys.readouterr().err == (
        "error: the recipes of table 2 are for latents of side 64, but protocol imagenet256_own "
        "has 32; choose imagenet512_own\n"
    )
