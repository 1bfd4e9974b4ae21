"""Evidence: pairs are judged by their interval, both lengths and the paper; gaps are said."""

from __future__ import annotations

import csv
import re
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
from analysis.evidence.speeds import speed_agreement
from analysis.query import ReferenceStore
from experiments.ablation import TABLE_4
from experiments.declared.campaign import SPREAD_ROWS, Ladder
from experiments.declared.protocols import DIGITS, at_half_length, with_independent_weights
from experiments.engine.records.store import Record, Store, write_record
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.paired import Difference
from experiments.engine.specs.spec import HeldOut, canonical, spec_id
from experiments.engine.specs.stages import distinct_networks, heldout_stage, timing_stage
from tests.support.references import PROVENANCE, commit_records, timing_values

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


def test_the_page_says_what_shared_weights_do_to_the_spread(store):
    assert "initial weights that rows share" not in evidence_page(store)
    independent = with_independent_weights(DIGITS)
    for number, label in enumerate(SPREAD_ROWS):
        for seed in range(len(SEED_EFFECTS)):
            loss = 0.04 * (1 + 0.01 * ((5 * number + 3 * seed) % 4))
            write(store, heldout_stage(TABLE_4.row(label), independent, seed), loss)
    store.refresh()
    page = evidence_page(store)
    (line,) = [line for line in page.splitlines() if line.startswith("| w/o CCA over DiCo-S |")]
    shared, alone = (float(cell) for cell in line.strip("| ").split(" | ")[1:])
    assert shared < 0.05 < 1 < alone


def test_the_page_says_whether_the_best_rate_moves(store):
    stages = Ladder(TABLE_4.row("DiCo-S"), DIGITS).full_stages()
    for stage, loss in zip(stages.values(), (0.041, 0.04, 0.0396), strict=True):
        write(store, stage, loss)
    store.refresh()
    rate = max(stages)
    assert f"DiCo-S: the best rate moves to {rate:g} (" in evidence_page(store)
    assert f"{rate:g}: -1.00 %)" in evidence_page(store)


def test_a_page_compares_each_rate_with_the_common_one(store):
    ladder = Ladder(ROWS[0], DIGITS)
    write(store, ladder.stage(DIGITS.recipe.lr), 0.0404)
    write(store, ladder.stage(DIGITS.recipe.lr / 2), 0.04)
    write(store, ladder.stage(DIGITS.recipe.lr / 4), 0.05)
    store.refresh()
    page = evidence_page(store)
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    cells = {line[0].strip(): [cell.strip() for cell in line] for line in reversed(lines)}
    header, line = cells["row"], cells[ROWS[0].label]
    assert line[header.index("at the common lr, %")] == "1.00"


def test_the_order_by_speed_has_an_interval(tmp_path: Path):
    for spread in (0.0, 5.0):
        store = Store(tmp_path / str(spread))
        published = store.published("table4.csv", ("variant",))
        for row in TABLE_4.rows:
            rate = float(published[row.published]["throughput_img_s"]) / 1000
            values = timing_values(relative=rate, relative_spread=spread)
            store.append(timing_stage(row, TABLE_4.baseline, "cpu"), "done", values, PROVENANCE)
        found = speed_agreement(TABLE_4, commit_records(tmp_path / str(spread)))
        assert found.agreement.tau == pytest.approx(1)
        assert len(found.records) == 11
        width = found.agreement.high - found.agreement.low
        assert width > 0.5 if spread else width == pytest.approx(0)


def test_links_of_the_committed_pages_lead_to_records():
    tables = REPOSITORY / "results" / "tables"
    for path in tables.glob("*.md"):
        links = re.findall(r"\]\(([^)]*)\)", path.read_text())
        assert all((tables / link).is_file() for link in links)
        # Pages of published numbers, of predictions, or of rows that nothing has trained yet.
        unmeasured = ("table6", "table7", "distillation", "memory", "latency", "inference_memory")
        may_lack = path.stem.startswith("predicted_") or path.stem.endswith("_savings")
        assert links or path.stem in unmeasured or may_lack, path.name


def test_without_records_nothing_is_claimed(tmp_path: Path):
    empty = ReferenceStore(tmp_path)
    assert evidence_csv(empty).count("\n") == 1
    assert "pairs" not in evidence_page(empty)
    assert not pairs(replace(TABLE_4), DIGITS, empty)
