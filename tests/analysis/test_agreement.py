"""How well an order of rows agrees with the paper's, and the pages that say so."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
from scipy import stats

from analysis.query import DISTANCE, ReferenceStore
from analysis.tables.ablations import RECONSTRUCTED
from analysis.tables.agreement import (
    chance_of,
    kendall_taus,
    measure_agreement,
    measure_speed_agreement,
    resolve_pairs,
)
from analysis.tables.agreement_page import agreement_blocks, agreement_page
from analysis.tables.pages import Origins, Text
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import CIFAR10_SMALL
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.stages import evaluate_stage, timing_stage
from tests.support.references import (
    PROVENANCE,
    commit_records,
    digits_values,
    reference_of_scores,
    timing_values,
)

TIGHT = (0.999, 1.0, 1.001)


@pytest.fixture(scope="module")
def committed() -> ReferenceStore:
    return ReferenceStore()


@pytest.fixture(scope="module")
def paper_fid() -> dict[str, float]:
    """The paper's FID of Table 4's rows."""
    published = ReferenceStore().published("table4.csv", ("variant",))
    return {row.label: float(published[row.published]["fid"]) for row in TABLE_4.rows}


def test_fast_rank_correlations_equal_scipys():
    generator = random.Random(3)
    for size in (3, 7, 11):
        for top in (2, 5, 100):
            a, b = ([float(generator.randrange(top)) for _ in range(size)] for _ in range(2))
            (tau,) = kendall_taus([a], [b])
            assert tau == pytest.approx(stats.kendalltau(a, b).statistic, nan_ok=True)


def test_agreement_with_the_paper_is_found(paper_fid: dict[str, float], tmp_path: Path):
    scores = {label: [fid - 0.01, fid, fid + 0.01] for label, fid in paper_fid.items()}
    same = measure_agreement(DISTANCE, TABLE_4, reference_of_scores(tmp_path, scores))
    assert same.tau == pytest.approx(1)
    assert same.rho == pytest.approx(1)
    assert same.low > 0.9
    assert same.chance < 0.01
    assert same.ceiling > 0.95
    assert same.rows == 11
    assert same.seeds == "3"
    assert same.freedom == 22


def test_noise_lowers_the_interval_and_the_ceiling(paper_fid: dict[str, float], tmp_path: Path):
    scores = {label: [fid / 3, fid, 3 * fid] for label, fid in paper_fid.items()}
    noisy = measure_agreement(DISTANCE, TABLE_4, reference_of_scores(tmp_path, scores))
    assert noisy.tau == pytest.approx(1)
    assert noisy.low < 0
    assert noisy.ceiling < 0.2


def test_the_opposite_order_does_not_agree(paper_fid: dict[str, float], tmp_path: Path):
    scores = {label: [99 - fid, 100 - fid, 101 - fid] for label, fid in paper_fid.items()}
    opposite = measure_agreement(DISTANCE, TABLE_4, reference_of_scores(tmp_path, scores))
    assert opposite.tau == pytest.approx(-1)
    assert opposite.chance > 0.99


def test_without_repeated_seeds_nothing_is_known(paper_fid: dict[str, float], tmp_path: Path):
    store = reference_of_scores(tmp_path, {label: [fid] for label, fid in paper_fid.items()})
    assert measure_agreement(DISTANCE, TABLE_4, store) is None
    assert resolve_pairs(TABLE_4, store) is None


@pytest.mark.parametrize("size", [3, 5])
def test_chance_among_few_rows_is_the_exact_share_of_orders(size: int):
    generator = random.Random(size)
    paper = [float(value) for value in range(size)]
    for ours in (paper, paper[::-1], generator.sample(paper, size), [0.0, *paper[:-1]]):
        tau = stats.kendalltau(ours, paper).statistic
        orders = itertools.permutations(ours)
        as_good = [stats.kendalltau(order, paper).statistic >= tau - 1e-9 for order in orders]
        share = sum(as_good) / math.factorial(size)
        assert chance_of(ours, paper, generator) == pytest.approx(share)
    assert chance_of(paper, paper, generator) == 1 / math.factorial(size)


def test_chance_among_many_rows_is_near_the_exact_share():
    paper = [float(value) for value in range(8)]
    ours = [1.0, 0.0, 3.0, 2.0, 5.0, 4.0, 7.0, 6.0]
    exact = stats.kendalltau(ours, paper, alternative="greater", method="exact").pvalue
    assert chance_of(ours, paper, random.Random(0)) == pytest.approx(exact, abs=0.004)


@pytest.mark.parametrize("spread, width", [(0.0, 0.0), (5.0, 0.5)])
def test_the_order_by_speed_has_an_interval(spread: float, width: float, tmp_path: Path):
    store = Store(tmp_path)
    published = store.published("table4.csv", ("variant",))
    for row in TABLE_4.rows:
        rate = float(published[row.published]["throughput_img_s"]) / 1000
        values = timing_values(relative=rate, relative_spread=spread)
        store.append(timing_stage(row, TABLE_4.baseline, "cpu"), "done", values, PROVENANCE)
    found = measure_speed_agreement(TABLE_4, commit_records(tmp_path))
    assert found.tau == pytest.approx(1)
    assert len(found.records) == 11
    assert found.high - found.low >= width
    assert spread or found.low == pytest.approx(1)


def test_pairs_far_apart_are_resolved(tmp_path: Path):
    rows = [row.label for row in reversed(TABLE_3.rows)]
    scores = {label: [4.0**k * part for part in (1, 1.01, 0.99)] for k, label in enumerate(rows)}
    pairs = resolve_pairs(TABLE_3, reference_of_scores(tmp_path, scores, TABLE_3))
    assert len(pairs.resolved) == 15
    assert not pairs.not_resolved
    assert pairs.certain == 6


def test_pairs_within_the_noise_are_not_resolved(tmp_path: Path):
    scores = {row.label: [10.0, 20.0, 40.0] for row in TABLE_3.rows}
    store = reference_of_scores(tmp_path, scores, TABLE_3)
    assert not resolve_pairs(TABLE_3, store).resolved
    assert "Of 15 pairs of rows the seeds resolve 0. 0 of 6 rows" in agreement_page(store)


@pytest.fixture(scope="module")
def by_fid() -> list[str]:
    """Table 3's rows in the order of the paper's FID."""
    published = ReferenceStore().published(TABLE_3.published, TABLE_3.key)
    rows = sorted(TABLE_3.rows, key=lambda row: float(published[row.published]["fid"]))
    return [row.label for row in rows]


def test_the_page_names_the_resolved_pairs_if_they_are_fewer(by_fid: list[str], tmp_path: Path):
    """One network is far worse than all others; by the paper it is the second best."""
    best, second, *others = by_fid
    scores = {
        label: [(90.0 if label == second else 10.0) * part for part in TIGHT] for label in by_fid
    }
    page = agreement_page(reference_of_scores(tmp_path, scores, TABLE_3))
    assert "the seeds resolve 5, and the paper orders 1 of these alike. Resolved: " in page
    assert f"{best} before {second}" in page
    against = page.partition("Resolved against the paper's order: ")[2].partition(" of 6 rows")[0]
    assert f"{best} before" not in against
    assert all(f"{label} before {second}" in against for label in others)


def test_the_page_names_the_pairs_that_are_not_resolved_if_they_are_fewer(
    by_fid: list[str], tmp_path: Path
):
    """The two best networks are alike."""
    scores = {
        label: [4.0 ** max(place, 1) * part for part in TIGHT] for place, label in enumerate(by_fid)
    }
    page = agreement_page(reference_of_scores(tmp_path, scores, TABLE_3))
    assert "the seeds resolve 14, and the paper orders 14 of these alike. Not resolved: " in page
    named = page.partition("Not resolved: ")[2].partition(". ")[0].split(" and ")
    assert set(named) == set(by_fid[:2])


def test_the_digits_page_follows_the_records(committed: ReferenceStore, tmp_path: Path):
    assert "nothing can be said" in agreement_page(ReferenceStore(tmp_path))
    tau = measure_agreement(DISTANCE, TABLE_3, committed).tau
    assert f"tau {tau:.2f}" in agreement_page(committed)


def test_the_page_on_small_cifar_gives_the_order_and_the_gaps(tmp_path: Path):
    rows = [row.label for row in reversed(TABLE_3.rows[1:])]
    scores = {label: [50.0 + 10 * k, 51.0 + 10 * k] for k, label in enumerate(rows)}
    store = reference_of_scores(tmp_path, scores, TABLE_3, CIFAR10_SMALL)
    page = agreement_page(store, CIFAR10_SMALL)
    assert "5 rows, 2 seeds each. The order by fd_cifar_classifier" in page
    assert "| fd_cifar_classifier | fid | " in page
    assert "CPU" not in page
    assert "| DiT (iso.) | - | - | - | - | - | 67.16 |" in page
    assert "| DiCo (U-shape) | 50.5 ±0.5 |" in page

    # the full protocol has no record, so columns of ours are left out and the paper's stay
    assert page.count("| CM->Agent Attn | - | - | - | - | - | 52.07 |") == 1
    assert page.count("| CM->Agent Attn | 52.07 |") == 1
    assert "400000 steps of 256, 50000 images" in page
    assert "## Table 4: Components of DiCo\n\nNo committed records with repeated seeds" in page


def test_the_page_on_small_cifar_keeps_what_its_records_warn_of(tmp_path: Path):
    store = Store(tmp_path)
    values = digits_values(1.0, "cifar_classifier") | {"warnings": ["the images are grey"]}
    stage = evaluate_stage(TABLE_3.rows[0], CIFAR10_SMALL, 0)
    store.append(stage, "done", values, PROVENANCE | {"dirty": True})
    page = agreement_page(commit_records(tmp_path), CIFAR10_SMALL)
    assert page.count("Warning: the images are grey.") == 1
    assert "1 record of commit cccccccccccc; precision flags in force" in page
    assert page.count("1 of these records comes from a tree with uncommitted changes") == 1
    assert RECONSTRUCTED in page


def test_links_of_the_committed_pages_lead_to_records():
    tables = REPOSITORY / "results" / "tables"
    for path in tables.glob("*.md"):
        links = re.findall(r"\]\(([^)]*)\)", path.read_text())
        assert all((tables / link).is_file() for link in links)
        # Pages of published numbers, of predictions, or of rows that nothing has trained yet.
        unmeasured = ("table6", "table7", "evidence", "distillation")
        assert links or path.stem in unmeasured or path.stem.startswith("predicted_"), path.name


def test_every_block_with_a_figure_of_ours_names_its_records(committed: ReferenceStore):
    blocks = agreement_blocks(committed)
    sheets = [block for block in blocks if isinstance(block, Sheet)]
    assert len(sheets) == 2
    for sheet in sheets:
        for key in ("tau", "range", "rho", "chance", "ceiling"):
            assert all(cell.records for cell in sheet.values(key)), key

    # sentences with a figure, and the lists of records below them
    sentences = [block for block in blocks if isinstance(block, Text) and "with tau" in block.words]
    assert len(sentences) == 4
    assert all(block.records for block in sentences)
    listed = {
        record.name
        for block in blocks
        if isinstance(block, Origins)
        for _, records in block.rows
        for record in records
    }
    for block in sentences:
        assert {record.name for record in block.records} <= listed
