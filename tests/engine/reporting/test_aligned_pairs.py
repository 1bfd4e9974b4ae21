"""The sheet of networks with and without alignment, and the table that no paper has."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.declared.protocols import CIFAR10_16
from experiments.engine.records.store import Store
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.specs.selection import Selection
from experiments.related import ALIGNMENT

MACHINE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}
SCORES = {"is_cifar_judge": 5, "precision_cifar_judge": 0.5, "recall_cifar_judge": 0.5}
SCORES["agreement"] = 0.5


def selected() -> Selection:
    return Selection(ALIGNMENT, ALIGNMENT.rows, CIFAR10_16, (0, 1), "cpu")


def test_every_network_is_a_pair_of_gaps_without_records(tmp_path: Path):
    _, sheet = report_sheets(selected(), Store(tmp_path))
    names = [row["row"].label for row in sheet.rows]
    assert names == ["DiT (iso.)", "SiT-XL", "DiCo-S", "U-ViT-L/2", "DiG-XL/2", "DiCo (iso.)"]
    assert all(cell.is_gap for row in sheet.rows for key, cell in row.items() if key != "row")


def test_changes_are_those_of_the_same_seed_and_costs_of_the_same_machine(tmp_path: Path):
    store, selection = Store(tmp_path), selected()
    plain, aligned = selection.rows[:2]

    def write(row: object, seed: int, loss: float, rate: float, cpu: str = "a") -> None:
        run = next(run for run in selection.runs if run.row is row and run.seed == seed)
        machine = MACHINE | {"cpu": cpu}
        store.append(run.trainings[-1], "done", {"images_per_s": rate}, machine)
        store.append(run.stage, "done", SCORES | {"fd_cifar_judge": 10 * loss}, machine)
        assert run.heldout is not None
        store.append(run.heldout, "done", {"heldout_loss": loss}, machine)

    # The second seed of the aligned row ran elsewhere, and tells nothing of the cost.
    write(plain, 0, 0.20, 100)
    write(aligned, 0, 0.19, 80)
    write(plain, 1, 0.40, 100)
    write(aligned, 1, 0.36, 10, cpu="other")
    store.refresh()
    _, sheet = report_sheets(selection, store)
    row = sheet.rows[0]
    change = row["heldout_loss_change"]
    assert change.value == pytest.approx(-7.5) and change.error == pytest.approx(2.5)
    assert row["heldout_loss_plain"].value == pytest.approx(0.3)
    assert row["fd_cifar_judge_aligned"].value == pytest.approx(2.75)
    assert row["cost"].value == pytest.approx(1.25) and row["cost"].error is None
