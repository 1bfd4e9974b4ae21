"""Verdicts on scores from made-up records at the claim's scale, never across two protocols."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.claims.finding import Finding
from analysis.claims.judge import judge
from analysis.query import ReferenceStore
from analysis.tables.conditions import same_conditions
from analysis.tables.progress import progress_row, stopped
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import IMAGENET256, IMAGENET256_OWN, IMAGENET512_OWN
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Checkpoint, Evaluate
from experiments.engine.specs.stages import Protocol, evaluate_stage, timing_stage, train_stage
from experiments.main_results import TABLE_1, TABLE_2
from tests.support.references import (
    GPU_PROVENANCE,
    add_losses,
    commit_records,
    imagenet_values,
    reopen_records,
    timing_values,
)


class Claims:
    """A temporary results folder whose committed records are those that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    def add(self, stage: Any, values: dict[str, Any]) -> None:
        """Append a record of a stage."""
        self.store.append(stage, "done", values, GPU_PROVENANCE)

    def score(
        self,
        row: Row,
        protocol: Protocol,
        *seeds: float,
        quantiser: str = "rounds",
        error: float = 0.1,
    ) -> None:
        """Append the FID of a row's training of every seed."""
        for seed, fid in enumerate(seeds):
            self.score_stage(evaluate_stage(row, protocol, seed), fid, quantiser, error)

    def score_stage(
        self, stage: Evaluate, fid: float, quantiser: str = "rounds", error: float = 0.1
    ) -> None:
        """Append a FID, of samples that a quantiser rounded."""
        self.add(stage, imagenet_values(stage, fid, error, quantiser))

    def time(self, row: Row, relative: float) -> None:
        """Append a timing on a GPU, relative to the baseline of table 4."""
        stage = timing_stage(row, TABLE_4.baseline, "cuda")
        self.add(stage, timing_values(1.0, 0.0, relative=relative, relative_spread=0.01))

    def judged(self, name: str) -> Finding:
        """Commit the records and judge a claim by them."""
        if (self.store.root / "records").exists():
            commit_records(self.store.root)
        sources = ReferenceStore(self.store.root)
        claim = next(row for row in sources.rows("claims.csv") if row["id"] == name)
        return judge(claim, sources)

    def reopen(self) -> None:
        """Let more records follow those that were judged."""
        self.store = reopen_records(self.store.root)


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path)


def system(label: str, table: Any = TABLE_1) -> Row:
    return table.row(label)


@pytest.mark.parametrize(
    "fid, verdict",
    [
        (2.1, "reproduced, one seed"),
        (2.5, "not reached, one seed"),
        (1.5, "lower than claimed, one seed"),
    ],
)
def test_a_printed_fid_is_judged_by_our_own(fid: float, verdict: str, claims: Claims):
    """A record of the claimed row decides, within two of its sampling errors."""
    claims.score(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, fid, error=0.05)
    finding = claims.judged("fid-xl-256")
    assert finding.evidence.value == "measured here"
    assert finding.value == f"{fid:.2f}"
    assert str(finding.judgement) == verdict
    assert len(finding.records) == 1
    assert finding.error == f"two sampling errors: {fid - 0.1:.2f} to {fid + 0.1:.2f}"
    assert "the paper's tables 2.05" in finding.basis

    # It decides nothing about another row.
    assert claims.judged("fid-h-256").evidence.value == "published data only"


def test_seeds_give_the_error_of_their_mean(claims: Claims):
    """Log 2, log 2 and log 2.2 deviate by 0.0550; Student's 4.303 over sqrt 3 makes 13.7 %."""
    claims.score(system("DiCo-XL (w/ CFG)", TABLE_2), IMAGENET512_OWN, 2.0, 2.0, 2.2)
    finding = claims.judged("fid-xl-512")
    assert finding.value == "2.06"
    assert finding.error == "95 %: 1.78 to 2.35"
    assert str(finding.judgement) == "lower than claimed"


def test_seeds_of_two_protocols_are_judged_by_neither(claims: Claims):
    """Two seeds that were scored differently are not compared, and the finding says so."""
    row = system("DiCo-XL (w/ CFG)")
    claims.score(row, IMAGENET256_OWN, 2.1)
    claims.score_stage(evaluate_stage(row, IMAGENET256_OWN, 1), 2.1, "truncates")
    finding = claims.judged("fid-xl-256")
    assert finding.evidence.value == "published data only"
    assert finding.basis.endswith(
        "our records are not compared, since scored by another protocol (quantiser)"
    )


def test_published_weights_stand_for_the_row_that_they_are(claims: Claims):
    """Published weights are the row's only with its guidance, and after its whole training."""
    stage = evaluate_stage(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, 0)
    weights = Checkpoint(stage.train.backbone, stage.train.data, "f" * 64)

    # Guided by another scale.
    other_scale = replace(stage.sampler, scale=1.5)
    claims.score_stage(replace(stage, train=weights, sampler=other_scale), 9.0)
    assert claims.judged("fid-xl-256").evidence.value == "published data only"

    # Guided as the row is.
    claims.reopen()
    claims.score_stage(replace(stage, train=weights), 2.06)
    finding = claims.judged("fid-xl-256")
    assert finding.evidence.value == "measured here"
    assert finding.value == "2.06"
    assert str(finding.judgement) == "reproduced, one seed"
    assert "the published weights ffffffffffff" in finding.basis

    # The row after 400K steps is another one.
    assert claims.judged("fid-dig-ratio").evidence.value == "published data only"


@pytest.mark.parametrize(
    "dig, verdict",
    [
        (18.6, "reproduced"),
        (30.0, "same direction, more than claimed"),
        (13.0, "same direction, less than claimed"),
        (11.8, "not resolved"),
        (9.0, "against the claim"),
    ],
)
def test_a_ratio_of_fids_is_judged_by_two_records(dig: float, verdict: str, claims: Claims):
    """The ratio of two recorded FIDs is compared with the claimed ratio."""
    claims.score(system("DiCo-XL"), IMAGENET256, 11.67)
    claims.score(system("DiG-XL/2"), IMAGENET256, dig)
    finding = claims.judged("fid-dig-ratio")
    assert finding.evidence.value == "measured here"
    assert finding.value == f"{dig / 11.67:.2f}"
    assert str(finding.judgement) == f"{verdict}, one seed"
    assert len(finding.records) == 2


def test_a_ratio_across_protocols_or_of_one_side_is_not_judged(claims: Claims):
    """A ratio needs both sides, scored alike."""
    # One side is missing.
    claims.score(system("DiCo-XL"), IMAGENET256, 11.67)
    finding = claims.judged("fid-dig-ratio")
    assert finding.evidence.value == "published data only"
    assert finding.basis.endswith("not scored on ImageNet here: DiG-XL/2@256 400K")

    # It comes, scored by another protocol.
    claims.reopen()
    claims.score(system("DiG-XL/2"), IMAGENET256, 18.6, quantiser="truncates")
    finding = claims.judged("fid-dig-ratio")
    assert finding.evidence.value == "published data only"
    assert finding.basis.endswith("scored by another protocol (quantiser)")


@pytest.mark.parametrize(
    "without, value, verdict",
    [
        (54.8, "4.80", "reproduced"),
        (60.0, "10.00", "same direction, more than claimed"),
        (50.1, "0.10", "not resolved"),
        (45.0, "-5.00", "against the claim"),
    ],
)
def test_points_at_the_claims_scale_outrank_digits(
    without: float, value: str, verdict: str, claims: Claims
):
    """Digits decide until both rows of the claim are scored on ImageNet."""
    # Digits alone.
    add_losses(claims.store, {"w/o CCA": 2.0})
    finding = claims.judged("cca-fid")
    assert finding.evidence.value == "measured at reduced scale"
    assert finding.value.startswith("2.00") and finding.value.endswith(" (ratio)")
    assert finding.basis.startswith("held-out loss on digits after 1000 steps, each network at its")
    assert len(finding.records) == 6
    assert str(finding.judgement) == "reproduced"

    # One row on ImageNet does not decide.
    claims.reopen()
    claims.score(TABLE_4.row("DiCo-S"), IMAGENET256, 50.0)
    finding = claims.judged("cca-fid")
    assert finding.evidence.value == "measured at reduced scale"
    assert "not judged on imagenet256: no record of w/o CCA" in finding.basis

    # Both rows do.
    claims.reopen()
    claims.score(TABLE_4.row("w/o CCA"), IMAGENET256, without)
    finding = claims.judged("cca-fid")
    assert finding.evidence.value == "measured here"
    assert finding.value == value
    assert str(finding.judgement) == f"{verdict}, one seed"
    assert {record.values["fid"] for record in finding.records} == {50.0, without}


def test_what_is_refused_at_the_claims_scale_leaves_the_digits_verdict_and_says_so(claims: Claims):
    """Two protocols on ImageNet leave the verdict to the digits."""
    add_losses(claims.store, {"w/o CCA": 2.0})
    claims.score(TABLE_4.row("DiCo-S"), IMAGENET256, 50.0)
    claims.score(TABLE_4.row("w/o CCA"), IMAGENET256, 54.8, quantiser="truncates")
    finding = claims.judged("cca-fid")
    assert finding.evidence.value == "measured at reduced scale"
    assert "not compared, since scored by another protocol: w/o CCA (quantiser)" in finding.basis


@pytest.mark.parametrize(
    "last, verdict",
    [(50.0, "reproduced"), (54.1, "same direction, 2 of 3 resolved"), (60.0, "against the claim")],
)
def test_an_order_at_the_claims_scale_needs_every_pair(last: float, verdict: str, claims: Claims):
    """DiCo must beat DiT in all three structures."""
    structures = (("iso.", 67.0, 60.0), ("iso.&skip", 62.0, 57.0), ("U-shape", 54.0, last))
    for name, dit, dico in structures:
        claims.score(TABLE_3.row(f"DiT ({name})"), IMAGENET256, dit)
        claims.score(TABLE_3.row(f"DiCo ({name})"), IMAGENET256, dico)
    finding = claims.judged("structure-order")
    assert finding.evidence.value == "measured here"
    assert str(finding.judgement) == f"{verdict}, one seed"
    assert finding.basis.startswith("fid on imagenet256, ")
    assert len(finding.records) == 6


@pytest.mark.parametrize(
    "speeds, verdict",
    [
        (None, "reproduced, one seed, by FID, throughput not measured on a GPU"),
        ((1.0, 0.9, 0.8), "reproduced, one seed"),
        ((1.0, 0.9, 0.95), "reproduced, one seed, by FID, by throughput against the claim"),
    ],
)
def test_kernels_are_ordered_by_fid_and_by_a_gpus_throughput(
    speeds: tuple[float, ...] | None, verdict: str, claims: Claims
):
    """Larger kernels are better and slower; either half of the claim can fail alone."""
    for place, label in enumerate(("DiCo-S", "DWC 5x5", "DWC 7x7")):
        row = TABLE_4.row(label)
        claims.score(row, IMAGENET256, 50.0 - 2 * place)
        if speeds:
            claims.time(row, speeds[place])
    finding = claims.judged("kernel-order")
    assert finding.evidence.value == "measured here"
    assert str(finding.judgement) == verdict
    assert len(finding.records) == (6 if speeds else 3)


def test_scaling_is_judged_where_neighbouring_sizes_were_trained(claims: Claims):
    """Two of 24 comparisons are recorded, one of them by two protocols; and three loss windows."""
    small = progress_row("DiCo-S")
    large = progress_row("DiCo-B")

    # Scores and losses after 400K steps.
    for row, fid, losses in ((small, 50.0, [0.5, 0.4, 0.3]), (large, 27.0, [0.4, 0.41, 0.2])):
        claims.score(row, stopped(400_000), fid)
        curve = {"every": 50, "losses": losses}
        values = {"loss": losses[-1], "steps": 400_000, "curve": curve}
        claims.add(train_stage(row, stopped(400_000), 0), values)

    # Scores after 50K steps, which cannot be compared.
    claims.score(small, stopped(50_000), 90.0)
    claims.score(large, stopped(50_000), 95.0, quantiser="truncates")

    # The finding counts what was compared and what was refused.
    finding = claims.judged("scaling-order")
    assert finding.evidence.value == "measured here"
    assert finding.value == "FID 1 of 1, resolved; loss 2 of 3"
    assert len(finding.records) == 4
    counts = "1 of 24 comparisons by FID, 2 of 3 windows by loss"
    assert str(finding.judgement) == f"same direction, {counts}, one seed"
    assert "1 comparisons refused, scored by another protocol" in finding.basis


def test_scaling_that_is_the_other_way_is_against_the_claim(claims: Claims):
    claims.score(progress_row("DiCo-L"), stopped(100_000), 20.0)
    claims.score(progress_row("DiCo-XL"), stopped(100_000), 30.0)
    finding = claims.judged("scaling-order")
    assert finding.value == "FID 0 of 1, resolved; loss 0 of 0"
    assert str(finding.judgement) == "against the claim, one seed"


def test_a_single_seed_without_a_sampling_error_is_open(claims: Claims):
    for label, fid in (("DiCo-XL", 11.67), ("DiG-XL/2", 18.6)):
        claims.add(evaluate_stage(system(label), IMAGENET256, 0), {"fid": fid})
    finding = claims.judged("fid-dig-ratio")
    assert finding.evidence.value == "not yet"
    assert str(finding.judgement) == "open"
    assert "no sampling error of fid" in finding.basis


def test_a_published_row_has_one_protocol():
    """A published number was made by the protocol that its guidance tells."""
    papers = ReferenceStore().published(TABLE_1.published, TABLE_1.key)
    names = {}
    for label in ("DiCo-XL", "DiCo-XL (w/ CFG)"):
        names[label] = same_conditions(papers[system(label).published], 256).name
    assert names == {"DiCo-XL": "imagenet256", "DiCo-XL (w/ CFG)": "imagenet256_own"}
