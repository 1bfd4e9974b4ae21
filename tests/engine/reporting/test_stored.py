"""What packing ternary weights saves: published beside measured, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.declared import timings
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.inference.stored import stored_sheet
from experiments.engine.reporting.sheet import Sheet
from experiments.related import TERNARY

PACKED = "TerDiT-4.2B (packed)"
STAGES = {
    row.label: row.stages["fp32"] for row in timings.latency_rows(TERNARY, TERNARY.rows, "cpu")
}
ORIGIN = {"commit": None, "dirty": None, "seconds": 1.0, "device": "cpu"}


def sheet_of(folder: Path) -> Sheet:
    store = Store(folder)
    return stored_sheet(TERNARY, STAGES, store, store.here)


def test_every_form_of_a_network_is_measured_by_itself():
    assert list(STAGES) == [row.label for row in TERNARY.rows]
    assert len({str(stage) for stage in STAGES.values()}) == len(STAGES)
    options = STAGES[PACKED].timing.backbone.options
    assert options == {"packed": True}


def test_published_memory_stands_before_anything_is_measured(tmp_path: Path):
    sheet = sheet_of(tmp_path)
    assert [cell.value for cell in sheet.values("weights_paper")] == [None, None, 16, 1.1]
    assert all(cell.is_gap for key in ("weights", "peak", "ms") for cell in sheet.values(key))


def test_a_measured_form_has_its_weights_its_peak_and_its_time(tmp_path: Path):
    values = dict(weights_bytes=1.0976e9, peak_memory_bytes_one=1.31e9, latency_s=17.5)
    Store(tmp_path).append(STAGES[PACKED], "done", values, ORIGIN)
    (row,) = (row for row in sheet_of(tmp_path).rows if row["row"].label == PACKED)
    assert [row[key].text() for key in ("weights", "peak", "ms")] == ["1.10", "1.31", "17500"]


@pytest.mark.parametrize("name", ["TerDiT-600M", "TerDiT-4.2B"])
def test_both_forms_have_the_same_count(name: str):
    forms = [row.costs for row in TERNARY.rows if row.label.startswith(name)]
    assert len(forms) == 2 and forms[0] == forms[1]
