"""What gates save: published, counted and measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.declared.protocols import DIGITS_LONG
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.savings import (
    gated_rows,
    savings_sheet,
    small_cost,
)
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.selection import Run, Selection
from experiments.related import DIT_PARENT, RELATED_SMALL

HALF = RELATED_SMALL.row("DyDiT, lambda 0.5")
SELECTION = Selection(RELATED_SMALL, RELATED_SMALL.rows, DIGITS_LONG, range(2), "cpu")
ORIGIN = {"commit": None, "dirty": None, "seconds": 1.0, "device": "cpu"}


def sheet_of(store: Store) -> Sheet:
    return savings_sheet(SELECTION, store, store.here)


def add_run(store: Store, run: Run, **values: float) -> None:
    """Record an evaluation with its loss on held-out images."""
    assert run.heldout
    store.append(run.stage, "done", values, ORIGIN)
    store.append(run.heldout, "done", {"heldout_loss": 0.1}, ORIGIN)


def test_rows_with_gates_have_published_savings_before_anything_is_run(tmp_path: Path):
    assert [row.label for row in gated_rows(SELECTION)] == [
        f"DyDiT, lambda {share}" for share in ("0.7", "0.5", "0.3")
    ]
    sheet = sheet_of(Store(tmp_path))
    published = [cell.value for cell in sheet.values("published_gflops")]
    assert published == pytest.approx([28.5, 47.9, 67.7], abs=0.05)
    assert [cell.value for cell in sheet.values("published_seconds")][1] == pytest.approx(
        35.4, abs=0.05
    )
    for key in ("used_share", "counted", "gathered", "masked", "agreement"):
        assert all(cell.is_gap for cell in sheet.values(key))


def test_savings_are_counted_at_the_used_share_and_measured_beside_it(tmp_path: Path):
    store = Store(tmp_path)
    store.append(small_cost(DIT_PARENT, DIGITS_LONG), "done", {"macs_core": 1000}, ORIGIN)
    store.append(small_cost(HALF, DIGITS_LONG), "done", {"macs_core": 1010}, ORIGIN)
    for run, parent, used in zip(
        SELECTION.runs_of(HALF), SELECTION.runs_of(DIT_PARENT), (0.4, 0.6), strict=True
    ):
        gates = dict(used_share=used, used_share_sd=0.2, gated_macs=900.0)
        speed = dict(gathered_speed_up=1.25, masked_speed_up=0.8)
        add_run(store, run, agreement=0.90, **gates, **speed)
        add_run(store, parent, agreement=0.93)

    row = next(row for row in sheet_of(store).rows if row["row"].label == HALF.label)
    assert row["used_share"].value == pytest.approx(0.5)
    # Half of 900 is off, of 1010 with routers, against 1000.
    assert row["counted"].value == pytest.approx(44)
    assert row["gathered"].value == pytest.approx(20)
    assert row["masked"].value == pytest.approx(-25)
    assert row["agreement"].value == pytest.approx(-0.03)
    assert row["counted"].records


def test_a_row_is_compared_with_its_parent_of_the_same_seed(tmp_path: Path):
    """The parent of the other seed says nothing about this one."""
    store = Store(tmp_path)
    first, second = SELECTION.runs_of(DIT_PARENT)
    add_run(store, first, agreement=0.5)
    add_run(store, second, agreement=0.93)
    measured = dict(used_share=0.5, used_share_sd=0.2, gathered_speed_up=1.2, masked_speed_up=0.9)
    add_run(store, SELECTION.runs_of(HALF)[1], agreement=0.9, **measured)

    row = next(row for row in sheet_of(store).rows if row["row"].label == HALF.label)
    assert row["agreement"].value == pytest.approx(-0.03)
    assert len(row["agreement"].records) == 2
