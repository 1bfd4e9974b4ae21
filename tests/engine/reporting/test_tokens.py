"""Tables of networks that predict tokens beside networks that predict noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.declared.campaign import Ladder
from experiments.declared.protocols import DIGITS_LONG, at_half_length
from experiments.engine.records.store import Store
from experiments.engine.reporting.sheet import UNDEFINED
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import spec_id
from experiments.related import AUTOREGRESSIVE

MACHINE = {
    "commit": "0" * 40,
    "dirty": False,
    "host": "h",
    "torch": "2",
    "cpu": "a CPU",
    "device": "cpu",
    "seconds": 1.0,
}
VAR = AUTOREGRESSIVE.row("VAR")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two seeds of every row."""
    store = Store(tmp_path)
    selection = Selection(AUTOREGRESSIVE, AUTOREGRESSIVE.rows, DIGITS_LONG, (0, 1), "cpu")
    for place, run in enumerate(selection.runs):
        scores = {
            "fd_digits_judge": 12.0 + place,
            "precision_digits_judge": 0.8,
            "recall_digits_judge": 0.7,
            "agreement": 0.95,
            "num": 500,
            "nfe": 4.0,
        }
        store.append(run.stage, "done", scores, MACHINE)
        name = "heldout_cross_entropy" if run.row.predicts_tokens else "heldout_loss"
        assert run.heldout is not None
        store.append(run.heldout, "done", {name: 0.5 + 0.01 * place}, MACHINE)
    return store


def test_the_loss_that_is_not_defined_is_named_and_not_ranked(store: Store):
    selection = Selection(AUTOREGRESSIVE, AUTOREGRESSIVE.rows, DIGITS_LONG, (0, 1), "cpu")
    sheet = main_sheet(selection, store, store.here)
    rows = {row["row"].label: row for row in sheet.rows}

    # Each kind of network has its own loss; both have the scores of samples.
    assert rows["VAR"]["heldout_loss"] == UNDEFINED
    assert rows["VAR"]["heldout_cross_entropy"].value == pytest.approx(0.535)
    assert rows["DiCo-S"]["heldout_cross_entropy"] == UNDEFINED
    assert rows["DiCo-S"]["heldout_loss"].value == pytest.approx(0.515)
    assert rows["VAR"]["agreement"].value == 0.95

    notes = " ".join(note.text for note in sheet.notes)
    assert "Not compared, since it has no heldout_loss: VAR." in notes
    assert "heldout_loss against DiCo-S" in notes
    assert VAR.note in notes

    # A table without such networks has no such column.
    plain = selection.with_rows(AUTOREGRESSIVE.rows[:2])
    assert not main_sheet(plain, store, store.here).has("heldout_cross_entropy")


def test_a_ladder_chooses_a_rate_by_the_cross_entropy(store: Store):
    ladder = Ladder(VAR, DIGITS_LONG)
    assert ladder.stage(5e-3).train.recipe.steps == at_half_length(DIGITS_LONG).recipe.steps
    for rate, loss in ((2.5e-3, 0.6), (5e-3, 0.55), (1e-2, 0.7)):
        store.append(ladder.stage(rate), "done", {"heldout_cross_entropy": loss}, MACHINE)
    assert ladder.best(store) == 5e-3
    assert not ladder.jobs(store)


def test_tokens_are_those_of_four_scales_and_name_the_run():
    # At the protocol's own rate, whatever the ladder has chosen since.
    protocol = replace(DIGITS_LONG, rates={})
    (run,) = Selection(AUTOREGRESSIVE, [VAR], protocol, (0,), "cpu").runs
    assert run.stage.sampler.num_steps == 4
    assert run.stage.train.tokenizer is not None
    assert spec_id(run.stage.train) == "b6305bd4a6ee7541"
