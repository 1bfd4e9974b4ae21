"""Verdicts on counted and timed claims, and the sheet of all claims."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.claims.finding import MEANINGS, Evidence, Finding, Subject
from analysis.claims.judge import claims_sheet, judge
from analysis.query import ReferenceStore
from analysis.tables.paper import SHEETS
from experiments.declared import speed_claims, timings
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict
from experiments.engine.specs.spec import Backbone, Timing
from tests.support.references import (
    GPU_PROVENANCE,
    PROVENANCE,
    add_losses,
    commit_records,
    reopen_records,
    timing_values,
)
from tests.support.sheets import note_texts, row_of, texts

PUBLISHED = REPOSITORY / "results" / "published"
SMALL = dict(subject="DiCo-S@512", baseline="DiS-S/2@512")


@pytest.fixture(scope="module")
def committed() -> ReferenceStore:
    return ReferenceStore()


def find(name: str, store: ReferenceStore) -> Finding:
    """The finding of a claim of claims.csv."""
    return judge(next(row for row in store.rows("claims.csv") if row["id"] == name), store)


@pytest.mark.parametrize(
    "text, row, matches",
    [
        ("DiCo-XL@256 cfg", dict(model="DiCo-XL", cfg="yes", train_steps=""), True),
        ("DiCo-XL@256 cfg", dict(model="DiCo-XL", cfg="no", train_steps="400000"), False),
        ("DiG-XL/2@256 400K", dict(model="DiG-XL/2", cfg="no", train_steps="400000"), True),
        ("DiG-XL/2@256", dict(model="DiG-XL/2", cfg="no", train_steps="400000"), True),
        ("DiG-XL/2@256", dict(model="DiCo-XL", cfg="no", train_steps="400000"), False),
    ],
)
def test_a_subject_names_the_published_row(text: str, row: dict[str, str], matches: bool):
    subject = Subject.parse(text)
    assert subject.resolution == 256
    assert subject.file == "table1.csv"
    assert subject.matches(row) == matches


def test_a_claims_basis_leads_to_what_was_read_for_it(committed: ReferenceStore):
    sheet = claims_sheet(committed)
    speed, order, cca, fid = (
        row_of(sheet, name) for name in ("speed-xl-256", "kernel-order", "cca-fid", "fid-xl-256")
    )
    assert [record.kind for record in speed["basis"].records] == ["timing"]
    assert not speed["value"].records
    assert {record.kind for record in order["basis"].records} == {"timing", "heldout"}
    assert cca["error"].records
    assert not fid["basis"].records


def test_every_claim_gets_a_verdict(committed: ReferenceStore, tmp_path: Path):
    for store in (committed, ReferenceStore(tmp_path)):
        sheet = claims_sheet(store)
        assert texts(sheet, "claim") == [row["id"] for row in store.rows("claims.csv")]
        assert {cell.choice for cell in sheet.values("evidence")} <= set(Evidence)
        assert all(texts(sheet, "verdict"))
        assert all(texts(sheet, "basis"))
        for value, error in zip(texts(sheet, "value"), texts(sheet, "error"), strict=True):
            assert value == "-" or error != "-"
    assert not {"counted", "measured at reduced scale"} & set(texts(sheet, "evidence"))


def test_every_verdict_of_the_committed_records_is_in_the_legend(committed: ReferenceStore):
    claims = committed.rows("claims.csv")
    for finding in (judge(claim, committed) for claim in claims):
        assert finding.judgement.verdict in MEANINGS
    notes = note_texts(claims_sheet(committed))
    for verdict, meaning in MEANINGS.items():
        assert f"{verdict.value}: {meaning}." in notes


def test_counted_claims_are_judged_to_the_printed_digit(committed: ReferenceStore):
    for name in ("gflops-xl-256", "gflops-family"):
        assert find(name, committed).judgement == Judgement(Verdict.REPRODUCED)
    off = find("gflops-xl-512", committed)
    assert off.evidence is Evidence.COUNTED
    assert off.records
    assert off.judgement.verdict is Verdict.NOT_TO_THE_DIGIT
    assert str(off.judgement).endswith(" points")


@pytest.mark.parametrize(
    "worse, verdict",
    [(2.0, Verdict.REPRODUCED), (1.0, Verdict.NOT_RESOLVED), (0.5, Verdict.AGAINST)],
)
def test_a_claim_at_reduced_scale_follows_the_seeds(worse: float, verdict: Verdict, tmp_path: Path):
    add_losses(Store(tmp_path), {"w/o CCA": worse})
    finding = find("cca-fid", commit_records(tmp_path))
    assert finding.evidence == Evidence.REDUCED
    assert finding.judgement == Judgement(verdict)


def test_a_gpu_timing_outranks_published_throughput(tmp_path: Path):
    """A claim is judged by a timing of its networks on a GPU, in the modes that there are."""
    store = Store(tmp_path)
    spec = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", baseline=Backbone("dit_xl_2"))
    values = timing_values(136.0, 0.5, relative=1.36, relative_spread=0.01)
    for task in ("forward", "training"):
        store.append(replace(spec, what=task), "done", values, GPU_PROVENANCE)
    committed = commit_records(tmp_path)

    # The claim that is timed, and one that is not.
    finding = find("speed-xl-256", committed)
    assert finding.evidence == Evidence.MEASURED
    assert finding.value == "1.36 ±0.01 (fp32, a GPU)"
    assert finding.judgement.verdict is Verdict.DOES_NOT_HOLD
    assert "not measured in tf32" in str(finding.judgement)
    assert find("speed-dig-256", committed).evidence is Evidence.PUBLISHED

    # The same timing stands in table 1.
    table = SHEETS["table1"](committed)
    (column,) = [column for column in table.columns if column.title == "img/s, fp32, TF32 off"]
    assert "136.00 ±0.50" in texts(table, column.key)


LOOP = {"selective_scan": ["loop"]}


@pytest.mark.parametrize(
    ("ratio", "kernels", "judgement"),
    [
        (3.3, {}, Judgement(Verdict.HOLDS, (Qualifier.CPU_PROXY,))),
        (3.2, {}, Judgement(Verdict.DOES_NOT_HOLD, (Qualifier.CPU_PROXY,))),
        (3.3, LOOP, Judgement(Verdict.SAME_DIRECTION, (Qualifier.CPU_SCAN_LOOP,))),
        (1.005, LOOP, Judgement(Verdict.NO_DIRECTION, (Qualifier.CPU_SCAN_LOOP,))),
        (0.9, LOOP, Judgement(Verdict.OTHER_DIRECTION, (Qualifier.CPU_SCAN_LOOP,))),
    ],
)
def test_a_cpu_timing_of_a_claims_networks_is_a_proxy_until_a_gpus(
    ratio: float, kernels: dict[str, list[str]], judgement: Judgement, tmp_path: Path
):
    """Half a unit of 3.3's last digit and two errors of 0.005 reach down to 3.24."""
    store = Store(tmp_path)
    (stage,) = speed_claims.claim_stages(SMALL, "cpu")
    values = timing_values(6.0, 0.1, relative=ratio, relative_spread=0.005)
    provenance = PROVENANCE | {"cpu": "some CPU", "kernels": kernels}
    store.append(stage, "done", values, provenance)
    committed = commit_records(tmp_path)

    finding = find("speed-dis-small-512", committed)
    assert finding.evidence == Evidence.REDUCED
    assert finding.judgement == judgement
    assert finding.value == f"{ratio:.2f} ±0.01 (fp32, some CPU)"
    assert "on a CPU" in finding.basis
    assert "no GPU record is committed" in finding.basis
    assert ("as a loop over tokens" in finding.basis) == bool(kernels)

    # The same record is no evidence on DiS-H, and only shown for scale.
    other = find("speed-dis-512", committed)
    assert other.evidence is Evidence.PUBLISHED
    scale = f"Not the claim's, for scale: on a CPU in fp32, DiCo-S against DiS-S is {ratio:.2f}"
    assert scale in other.basis
    assert ("loop over tokens" in other.basis) == bool(kernels)
    assert find("speed-dim-512", committed).basis.endswith("no GPU record here")

    # A record of a GPU takes its place.
    store = reopen_records(tmp_path)
    for stage in speed_claims.claim_stages(SMALL, "cuda"):
        store.append(stage, "done", values | {"relative": 3.0}, GPU_PROVENANCE)
    finding = find("speed-dis-small-512", commit_records(tmp_path))
    assert finding.evidence is Evidence.MEASURED


def test_a_claim_names_the_modes_that_ran_without_their_fused_kernel(tmp_path: Path):
    store = Store(tmp_path)
    claim = store.published("claims.csv", ("id",))["speed-dig-256"]
    for stage in speed_claims.claim_stages(claim, "cuda"):
        ran = {"gated_linear": ["chunked" if stage.precision == "fp32" else "fla"]}
        values = timing_values(relative=3.0)
        store.append(stage, "done", values, GPU_PROVENANCE | {"kernels": ran})
    assert find("speed-dig-256", commit_records(tmp_path)).basis.endswith(
        "; gated linear attention in chunks of plain PyTorch, without its fused kernel, in fp32"
    )


def test_small_networks_timed_alone_give_a_ratio_with_the_error_of_both(tmp_path: Path):
    store = Store(tmp_path)
    alone = {stage.backbone.name: stage for stage in timings.figure_3("cpu") if stage.size == 64}
    for name, rate, spread in (("dico_s", 6.0, 0.3), ("dit_s_2", 3.0, 0.0)):
        store.append(alone[name], "done", timing_values(rate, spread), PROVENANCE)
    committed = commit_records(tmp_path)
    assert find("speed-xl-512", committed).basis.endswith(
        "DiCo-S against DiT-S is 2.00 ±0.10, each timed alone at batch 1"
    )
    assert "for scale" not in find("speed-dis-512", committed).basis


def test_published_inconsistencies_are_seen(tmp_path: Path):
    published = shutil.copytree(PUBLISHED, tmp_path / "published")
    path = published / "table1.csv"
    path.write_text(path.read_text().replace("208.47", "153.80"))
    finding = find("speed-xl-256", ReferenceStore(None, published))
    assert finding.judgement.verdict is Verdict.INCONSISTENT


@pytest.mark.parametrize(
    "name, row, column, claim",
    [
        ("table1.csv", "XL,DiCo-XL", "fid", "fid-dig-ratio"),
        ("dico_logs.csv", "DiCo-S", "lines", "scaling-order"),
        ("table7.csv", "DiCo-S", "sfid", "scaling-order"),
    ],
)
def test_a_published_zero_that_is_divided_by_is_named(
    name: str, row: str, column: str, claim: str, tmp_path: Path
):
    published = shutil.copytree(PUBLISHED, tmp_path / "published")
    head, *lines = (published / name).read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(row))
    cells = lines[at].split(",")
    cells[head.split(",").index(column)] = "0"
    lines[at] = ",".join(cells)
    (published / name).write_text("\n".join([head, *lines]) + "\n")
    finding = find(claim, ReferenceStore(None, published))
    assert finding.judgement.verdict is Verdict.OPEN
    assert f"{column} is 0, which is not above 0; leave a gap empty" in finding.basis
