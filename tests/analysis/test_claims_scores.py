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
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_OWN, IMAGENET512_OWN
from experiments.engine.records.manifest import manifest
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Checkpoint, Evaluate, canonical
from experiments.engine.specs.stages import Protocol, evaluate_stage, timing_stage, train_stage
from experiments.main_results import TABLE_1, TABLE_2
from tests.support.references import GPU_PROVENANCE


class Made:
    """A temporary results folder whose reference holds what `score` and `add` write."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    def add(self, stage: Any, values: dict[str, Any]) -> None:
        self.store.append(stage, "done", values, GPU_PROVENANCE)

    def score(
        self,
        row: Row,
        protocol: Protocol,
        *seeds: float,
        quantiser: str = "rounds",
        error: float = 0.1,
    ) -> None:
        for seed, fid in enumerate(seeds):
            self.scored(evaluate_stage(row, protocol, seed), fid, quantiser, error)

    def scored(
        self, stage: Evaluate, fid: float, quantiser: str = "rounds", error: float = 0.1
    ) -> None:
        whole = manifest(canonical(stage, full=True), {}, {"quantiser": quantiser})
        self.add(
            stage,
            {
                "fid": fid,
                "fid_se": error,
                "fid_corrected": fid,
                "is": 1.0,
                "precision": 0.5,
                "recall": 0.5,
                "manifest": whole,
            },
        )

    def judged(self, name: str) -> Finding:
        records = self.store.root / "records"
        reference = self.store.root / "reference"
        if records.exists():
            records.rename(reference)
        sources = ReferenceStore(self.store.root)
        return judge(next(row for row in sources.rows("claims.csv") if row["id"] == name), sources)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


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
def test_a_printed_fid_is_judged_by_our_own(fid: float, verdict: str, made: Made):
    made.score(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, fid, error=0.05)
    found = made.judged("fid-xl-256")
    assert found.evidence.value == "measured here"
    assert found.value == f"{fid:.2f}"
    assert str(found.judgement) == verdict
    assert len(found.records) == 1
    assert found.error == f"two sampling errors: {fid - 0.1:.2f} to {fid + 0.1:.2f}"
    assert "the paper's tables 2.05" in found.basis
    assert made.judged("fid-h-256").evidence.value == "published data only"


def test_seeds_give_the_error_of_their_mean(made: Made):
    """Log 2, log 2 and log 2.2 deviate by 0.0550; Student's 4.303 over sqrt 3 makes 13.7 %."""
    made.score(system("DiCo-XL (w/ CFG)", TABLE_2), IMAGENET512_OWN, 2.0, 2.0, 2.2)
    found = made.judged("fid-xl-512")
    assert found.value == "2.06"
    assert found.error == "95 %: 1.78 to 2.35"
    assert str(found.judgement) == "lower than claimed"


def test_seeds_of_two_protocols_are_judged_by_neither(made: Made):
    made.score(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, 2.1)
    made.scored(evaluate_stage(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, 1), 2.1, "truncates")
    found = made.judged("fid-xl-256")
    assert found.evidence.value == "published data only"
    assert found.basis.endswith(
        "our records are not compared, since scored by another protocol (quantiser)"
    )


def test_published_weights_stand_for_the_row_that_they_are(made: Made):
    """Guided as the row is; another scale, or the row after 400K steps, is not theirs."""
    stage = evaluate_stage(system("DiCo-XL (w/ CFG)"), IMAGENET256_OWN, 0)
    weights = Checkpoint(stage.train.backbone, stage.train.data, "f" * 64)
    made.scored(replace(stage, train=weights, sampler=replace(stage.sampler, scale=1.5)), 9.0)
    assert made.judged("fid-xl-256").evidence.value == "published data only"
    (made.store.root / "reference").rename(made.store.root / "records")
    made.scored(replace(stage, train=weights), 2.06)
    found = made.judged("fid-xl-256")
    assert found.evidence.value == "measured here"
    assert found.value == "2.06"
    assert str(found.judgement) == "reproduced, one seed"
    assert "the published weights ffffffffffff" in found.basis
    assert made.judged("fid-dig-ratio").evidence.value == "published data only"


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
def test_a_ratio_of_fids_is_judged_by_two_records(dig: float, verdict: str, made: Made):
    made.score(system("DiCo-XL"), IMAGENET256, 11.67)
    made.score(system("DiG-XL/2"), IMAGENET256, dig)
    found = made.judged("fid-dig-ratio")
    assert found.evidence.value == "measured here"
    assert found.value == f"{dig / 11.67:.2f}"
    assert str(found.judgement) == f"{verdict}, one seed"
    assert len(found.records) == 2


def test_a_ratio_across_protocols_or_of_one_side_is_not_judged(made: Made):
    made.score(system("DiCo-XL"), IMAGENET256, 11.67)
    found = made.judged("fid-dig-ratio")
    assert found.evidence.value == "published data only"
    assert found.basis.endswith("not scored on ImageNet here: DiG-XL/2@256 400K")
    (made.store.root / "reference").rename(made.store.root / "records")
    made.score(system("DiG-XL/2"), IMAGENET256, 18.6, quantiser="truncates")
    found = made.judged("fid-dig-ratio")
    assert found.evidence.value == "published data only"
    assert found.basis.endswith("scored by another protocol (quantiser)")


def digits(made: Made, label: str, fd: float) -> None:
    for seed, part in enumerate((0.99, 1.0, 1.01)):
        values = {
            "fd_digits": part * fd,
            "is_digits": 8.0,
            "precision_digits": 0.6,
            "recall_digits": 0.8,
            "agreement": 0.9,
        }
        made.add(evaluate_stage(TABLE_4.row(label), DIGITS, seed), values)


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
    without: float, value: str, verdict: str, made: Made
):
    for label, fd in (("DiCo-S", 10.0), ("w/o CCA", 20.0)):
        digits(made, label, fd)
    found = made.judged("cca-fid")
    assert found.evidence.value == "measured at reduced scale"
    assert found.value == "2.00 (ratio)"
    assert str(found.judgement) == "reproduced"
    (made.store.root / "reference").rename(made.store.root / "records")
    made.score(TABLE_4.row("DiCo-S"), IMAGENET256, 50.0)
    part = made.judged("cca-fid")
    assert part.evidence.value == "measured at reduced scale"
    assert "not judged on imagenet256: no record of w/o CCA" in part.basis
    (made.store.root / "reference").rename(made.store.root / "records")
    made.score(TABLE_4.row("w/o CCA"), IMAGENET256, without)
    found = made.judged("cca-fid")
    assert found.evidence.value == "measured here"
    assert found.value == value
    assert str(found.judgement) == f"{verdict}, one seed"
    assert {record.values["fid"] for record in found.records} == {50.0, without}


def test_what_is_refused_at_the_claims_scale_leaves_the_digits_verdict_and_says_so(made: Made):
    for label, fd in (("DiCo-S", 10.0), ("w/o CCA", 20.0)):
        digits(made, label, fd)
    made.score(TABLE_4.row("DiCo-S"), IMAGENET256, 50.0)
    made.score(TABLE_4.row("w/o CCA"), IMAGENET256, 54.8, quantiser="truncates")
    found = made.judged("cca-fid")
    assert found.evidence.value == "measured at reduced scale"
    assert "not compared, since scored by another protocol: w/o CCA (quantiser)" in found.basis


@pytest.mark.parametrize(
    "last, verdict",
    [(50.0, "reproduced"), (54.1, "same direction, 2 of 3 resolved"), (60.0, "against the claim")],
)
def test_an_order_at_the_claims_scale_needs_every_pair(last: float, verdict: str, made: Made):
    for name, dit, dico in (
        ("iso.", 67.0, 60.0),
        ("iso.&skip", 62.0, 57.0),
        ("U-shape", 54.0, last),
    ):
        made.score(TABLE_3.row(f"DiT ({name})"), IMAGENET256, dit)
        made.score(TABLE_3.row(f"DiCo ({name})"), IMAGENET256, dico)
    found = made.judged("structure-order")
    assert found.evidence.value == "measured here"
    assert str(found.judgement) == f"{verdict}, one seed"
    assert found.basis.startswith("fid on imagenet256, ")
    assert len(found.records) == 6


@pytest.mark.parametrize(
    "speeds, verdict",
    [
        (None, "reproduced, one seed, by FID, throughput not measured on a GPU"),
        ((1.0, 0.9, 0.8), "reproduced, one seed"),
        ((1.0, 0.9, 0.95), "reproduced, one seed, by FID, by throughput against the claim"),
    ],
)
def test_kernels_are_ordered_by_fid_and_by_a_gpus_throughput(
    speeds: tuple[float, ...] | None, verdict: str, made: Made
):
    for place, label in enumerate(("DiCo-S", "DWC 5x5", "DWC 7x7")):
        made.score(TABLE_4.row(label), IMAGENET256, 50.0 - 2 * place)
        if speeds:
            made.add(
                timing_stage(TABLE_4.row(label), TABLE_4.baseline, "cuda"),
                {
                    "images_per_s": 1.0,
                    "images_per_s_spread": 0.0,
                    "relative": speeds[place],
                    "relative_spread": 0.01,
                },
            )
    found = made.judged("kernel-order")
    assert found.evidence.value == "measured here"
    assert str(found.judgement) == verdict
    assert len(found.records) == (6 if speeds else 3)


def test_scaling_is_judged_where_neighbouring_sizes_were_trained(made: Made):
    """Two of 24 comparisons are recorded, one of them by two protocols; and three loss windows."""
    small = progress_row("DiCo-S")
    large = progress_row("DiCo-B")
    for row, fid, losses in ((small, 50.0, [0.5, 0.4, 0.3]), (large, 27.0, [0.4, 0.41, 0.2])):
        made.score(row, stopped(400_000), fid)
        made.add(
            train_stage(row, stopped(400_000), 0),
            {"loss": losses[-1], "steps": 400_000, "curve": {"every": 50, "losses": losses}},
        )
    made.score(small, stopped(50_000), 90.0)
    made.score(large, stopped(50_000), 95.0, quantiser="truncates")
    found = made.judged("scaling-order")
    assert found.evidence.value == "measured here"
    assert found.value == "FID 1 of 1, resolved; loss 2 of 3"
    assert len(found.records) == 4
    assert (
        str(found.judgement)
        == "same direction, 1 of 24 comparisons by FID, 2 of 3 windows by loss, one seed"
    )
    assert "1 comparisons refused, scored by another protocol" in found.basis


def test_scaling_that_is_the_other_way_is_against_the_claim(made: Made):
    made.score(progress_row("DiCo-L"), stopped(100_000), 20.0)
    made.score(progress_row("DiCo-XL"), stopped(100_000), 30.0)
    found = made.judged("scaling-order")
    assert found.value == "FID 0 of 1, resolved; loss 0 of 0"
    assert str(found.judgement) == "against the claim, one seed"


def test_a_single_seed_without_a_sampling_error_is_open(made: Made):
    for label, fid in (("DiCo-XL", 11.67), ("DiG-XL/2", 18.6)):
        made.add(evaluate_stage(system(label), IMAGENET256, 0), {"fid": fid})
    found = made.judged("fid-dig-ratio")
    assert found.evidence.value == "not yet"
    assert str(found.judgement) == "open"
    assert "no sampling error of fid" in found.basis


def test_a_published_row_has_one_protocol():
    papers = ReferenceStore().published(TABLE_1.published, TABLE_1.key)
    assert {
        label: same_conditions(papers[system(label).published], 256).name
        for label in ("DiCo-XL", "DiCo-XL (w/ CFG)")
    } == {"DiCo-XL": "imagenet256", "DiCo-XL (w/ CFG)": "imagenet256_own"}
