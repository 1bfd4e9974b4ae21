"""Evidence: pairs are judged by their interval, both lengths and the paper; gaps are said."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.evidence.page import evidence_page
from analysis.evidence.pairs import (
    PairVerdict,
    evidence_csv,
    judge_pair,
    pairs,
    trained,
)
from analysis.query import ReferenceStore
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, at_half_length
from experiments.engine.records.store import Record, Store, write_record
from experiments.engine.reporting.paired import Difference
from experiments.engine.specs.spec import HeldOut, canonical, spec_id
from experiments.engine.specs.stages import distinct_networks, heldout_stage

ORIGIN = {
    "commit": "abc",
    "dirty": False,
    "seconds": 1.0,
    "device": "cpu",
    "cpu": "a CPU",
    "torch": "2",
    "precision_flags": {"matmul_tf32": False},
}
ROWS = distinct_networks(TABLE_4, DIGITS)
# The effect of a seed is common to all rows, and larger than every difference of rows.
SEED_EFFECTS = (0.0, 0.03, -0.02, 0.05)


def write(store: Store, stage: HeldOut, loss: float) -> None:
    record = Record(
        spec_id(stage),
        "heldout",
        "done",
        {"heldout_loss": loss, "initial_share": 0.001},
        ORIGIN,
        "20261129T000000Z",
        canonical(stage, full=True),
    )
    path = store.reference.folder / "heldout" / f"{record.id}-{record.utc}-000000.json"
    write_record(path, record)


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    """Row number n is n per cent above the first, at both lengths; the last two cross."""
    store = ReferenceStore(tmp_path)
    for seed, effect in enumerate(SEED_EFFECTS):
        for number, row in enumerate(ROWS):
            noise = 1e-4 * ((7 * number + 3 * seed) % 5)
            loss = 0.04 * (1 + 0.01 * number) * (1 + effect) * (1 + noise)
            write(store, heldout_stage(row, DIGITS, seed), loss)
            half = at_half_length(DIGITS)
            crossed = -0.05 if row is ROWS[-1] else 0.0
            write(store, heldout_stage(row, half, seed), 1.1 * loss * (1 + crossed))
    store.refresh()
    return store


def test_differences_within_seeds_are_resolved_however_much_a_seed_moves_all(store):
    found = {(pair.a, pair.b): pair for pair in pairs(TABLE_4, DIGITS, store)}
    assert len(found) == len(ROWS) * (len(ROWS) - 1) // 2
    pair = found[ROWS[0].label, ROWS[5].label]
    assert pair.difference == pytest.approx(5, abs=0.1)
    assert pair.low < pair.difference < pair.high
    assert pair.high - pair.low < 0.2
    assert pair.verdict in (PairVerdict.AS_PAPER, PairVerdict.AGAINST_PAPER)


def test_a_pair_that_half_the_length_orders_otherwise_is_not_settled(store):
    found = {(pair.a, pair.b): pair for pair in pairs(TABLE_4, DIGITS, store)}
    assert found[ROWS[-2].label, ROWS[-1].label].verdict is PairVerdict.NOT_SETTLED


@pytest.mark.parametrize(
    "percent, low, high, paper, half, verdict",
    [
        (2.0, 1.0, 3.0, 4.0, 1.0, PairVerdict.AS_PAPER),
        (-2.0, -3.0, -1.0, -4.0, -0.1, PairVerdict.AS_PAPER),
        (2.0, 1.0, 3.0, -4.0, 1.0, PairVerdict.AGAINST_PAPER),
        (2.0, 1.0, 3.0, 4.0, None, PairVerdict.AS_PAPER),
        (2.0, -1.0, 5.0, 4.0, 1.0, PairVerdict.NOT_RESOLVED),
        (2.0, 1.0, 3.0, 4.0, -1.0, PairVerdict.NOT_SETTLED),
        (2.0, 1.0, 3.0, 0.0, 1.0, PairVerdict.PAPER_EQUAL),
    ],
)
def test_the_verdict_follows_interval_lengths_and_paper(percent, low, high, paper, half, verdict):
    difference = Difference("a", "b", percent, low, high)
    assert judge_pair(difference, paper, half) is verdict


def test_a_seed_that_one_row_lacks_is_left_out_for_all_and_said(store):
    folder = store.reference.folder / "heldout"
    stage = heldout_stage(ROWS[3], DIGITS, 2)
    next(folder.glob(f"{spec_id(stage)}-*")).unlink()
    store.refresh()
    side = trained(TABLE_4, DIGITS, store)
    assert side.complete_seeds == [0, 1, 3]
    assert side.lacking == {ROWS[3].label: [2]}
    assert f"{ROWS[3].label}: [2]" in evidence_page(store)


def test_the_page_and_the_csv_hold_every_pair(store):
    page = evidence_page(store)
    assert "Of 55 pairs at 1000 steps and 4 seeds" in page
    assert "Not trained yet." in page  # the other tables and protocols
    lines = list(csv.DictReader(evidence_csv(store).splitlines()))
    assert len(lines) == 55
    assert set(lines[0]) >= {"protocol", "table", "a", "b", "low", "high", "verdict"}
    assert {line["verdict"] for line in lines} <= {verdict.value for verdict in PairVerdict}


def test_without_records_nothing_is_claimed(tmp_path: Path):
    empty = ReferenceStore(tmp_path)
    assert evidence_csv(empty).count("\n") == 1
    assert "pairs" not in evidence_page(empty)
    assert not pairs(replace(TABLE_4), DIGITS, empty)
