"""Verdicts on claims of the second version of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.claims.finding import Evidence, Finding, Subject
from analysis.claims.judge import judge
from analysis.claims.version_2 import RIGHT
from analysis.query import ReferenceStore
from experiments.declared.protocols import DIGITS_TEXT
from experiments.engine.records.store import Store
from experiments.engine.reporting.verdict import Judgement, Verdict
from experiments.engine.specs.stages import evaluate_stage
from experiments.text_to_image import TABLE_V2_3
from tests.support.references import PROVENANCE, commit_records


@pytest.fixture(scope="module")
def committed() -> ReferenceStore:
    return ReferenceStore()


def find(name: str, store: ReferenceStore) -> Finding:
    """The finding of a claim of claims.csv."""
    return judge(next(row for row in store.rows("claims.csv") if row["id"] == name), store)


def with_shares(folder: Path, convolution: list[float], attention: list[float]) -> ReferenceStore:
    """Records of two networks' shares of right canvases, seed by seed."""
    store = Store(folder)
    for label, shares in (("DiCo-DWC", convolution), ("DiCo-CrossAttn", attention)):
        for seed, share in enumerate(shares):
            stage = evaluate_stage(TABLE_V2_3.row(label), DIGITS_TEXT, seed)
            store.append(stage, "done", {RIGHT: share}, PROVENANCE)
    return commit_records(folder)


def test_a_subject_names_its_table():
    assert Subject.parse("DiCo-DWC@256 v2-3").file == "tablev2-3.csv"
    assert Subject.parse("DiCo-S@1024").file == "tablev2-11.csv"
    assert Subject.parse("DiCo-XL@512 cfg").file == "table2.csv"


def test_gflops_are_counted_exactly(committed: ReferenceStore):
    for name, value in (("gflops-s-1024", "72.0 %"), ("gflops-flowdcn-sit", "24.6 %")):
        finding = find(name, committed)
        assert (finding.evidence, finding.value) == (Evidence.COUNTED, value)
        assert finding.judgement == Judgement(Verdict.REPRODUCED)

    # FlowDCN's published 4.4 Gflops are not what its code does, so the printed order turns.
    turned = find("gflops-flowdcn", committed)
    assert turned.judgement.verdict is Verdict.NOT_TO_THE_DIGIT
    assert turned.value == "95.0 %"


@pytest.mark.parametrize(
    "name",
    ["flowdcn-order", "lightningdit-order", "fid-lightningdit", "fid-coco-cross", "fid-coco-dwc"],
)
def test_what_cannot_be_run_is_numbers_only(name: str, tmp_path: Path):
    finding = find(name, ReferenceStore(tmp_path))
    assert finding.evidence is Evidence.PUBLISHED
    assert finding.judgement == Judgement(Verdict.CONSISTENT)
    assert not finding.records


@pytest.mark.parametrize(
    "convolution, verdict",
    [
        ([0.98, 0.97, 0.96], Verdict.REPRODUCED),
        ([0.98, 0.60, 0.97], Verdict.NOT_RESOLVED),
        ([0.70, 0.71, 0.72], Verdict.AGAINST),
    ],
)
def test_convolution_keeps_up_within_its_interval(
    convolution: list[float], verdict: Verdict, tmp_path: Path
):
    finding = find("text-convolution", with_shares(tmp_path, convolution, [0.97, 0.98, 0.96]))
    assert finding.evidence is Evidence.REDUCED
    assert finding.judgement == Judgement(verdict)
    assert len(finding.records) == 6


def test_without_both_networks_or_a_second_seed_nothing_is_settled(tmp_path: Path):
    alone = find("text-convolution", with_shares(tmp_path / "alone", [0.9, 0.9], []))
    assert alone.evidence is Evidence.PUBLISHED
    single = find("text-convolution", with_shares(tmp_path / "single", [0.9], [0.95]))
    assert single.judgement.verdict is Verdict.NOT_RESOLVED
