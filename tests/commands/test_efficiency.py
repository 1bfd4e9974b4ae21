"""Speed tables, sweeps, profiles and verdicts from records, and the command that makes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import efficiency
from experiments.declared import speed_claims
from experiments.declared import timings as speed
from experiments.engine.jobs import execute
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone, Ceilings, Cost, Profile, Stage, Timing
from experiments.engine.timing import cost
from experiments.engine.timing import profile as profiling
from experiments.engine.timing.operators import Operators
from experiments.main_results import TABLE_1

DICO = TABLE_1.row("DiCo-S")
SMALL = Timing(Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1))), 8, 3, 5, 2, "cpu")
CLAIM = dict(
    subject="DiCo-XL@256",
    baseline="DiT-XL/2@256",
    value="2.7",
    metric="throughput",
    relation="ratio",
)


def fill(store: Store, stage: Stage, **values: object) -> None:
    store.append(stage, "done", values, {"device": "a GPU", "cpu": "a CPU"})


def timed(rate: float, relative: float, spread: float = 0.0) -> dict[str, object]:
    return dict(
        images_per_s=rate,
        images_per_s_spread=1.0,
        relative=relative,
        relative_spread=spread,
        peak_memory_bytes=2**31,
        joules_per_image=0.5,
    )


def test_a_speed_sheet_sets_every_mode_beside_the_devices_ceiling_and_the_paper(tmp_path: Path):
    store = Store(tmp_path)
    (stage, *_) = stages = speed.stages(TABLE_1, [DICO], "cuda", "forward", named=False)
    assert [each.precision for each in stages] == ["fp32", "tf32", "bf16", "as_published"]
    assert (
        stages[-1].kernels == {"linear": "reference", "pointwise": "reference"}
        and not stage.kernels
    )
    assert [each.layout for each in stages] == ["channels_last"] * 3 + ["contiguous"]
    fill(store, Cost(Backbone("dico_s"), 32, 4, 1000), macs_core=4e9)
    fill(store, Ceilings("cuda", "fp32"), macs_per_s=20e12, bytes_per_s=3e12)
    fill(store, stage, **timed(1000.0, 1.4), bytes_moved=stage.batch * 12 * 10**8)
    sheet = speed.speed_sheet(TABLE_1, [DICO], "cuda", "forward", store)
    (row,) = sheet.rows
    assert [cell.text() for cell in row[:8]] == [
        "DiCo-S",
        "4.00",
        "1000.0 ±1.0",
        "1.40 ±0.00",
        "20",
        "40",
        "2.0",
        "0.50",
    ]
    assert [cell.text() for cell in row[8:14]] == ["-"] * 6 and [
        cell.text() for cell in row[-3:]
    ] == ["1695.7", "1.37", "74"]


def test_a_speed_sheet_names_rows_whose_attention_is_never_fused_and_those_timed_before_they_were_stable(
    tmp_path: Path,
):
    store, rows = (
        Store(tmp_path),
        [TABLE_1.row(label) for label in ("ADM-U", "LDM-4", "DiT-S/2", "DiCo-S")],
    )
    for stage, stable in zip(
        speed.stages(TABLE_1, rows, "cpu", "forward", named=True),
        ({}, {}, {"stable": True}, {"stable": False}),
        strict=True,
    ):
        fill(store, stage, **timed(10.0, 1.0), **stable)
    notes = speed.speed_sheet(TABLE_1, rows, "cpu", "forward", store).notes
    assert "ADM-U, LDM-4: attention is written out as in their authors' code, never fused." in notes
    assert [note for note in notes if "stable" in note] == [
        "DiCo-S (fp32): timed before the warm-up was stable."
    ]


def test_training_counts_three_passes_and_sampling_two_a_step(tmp_path: Path):
    store = Store(tmp_path)
    fill(store, Cost(Backbone("dico_s"), 32, 4, 1000), macs_core=1e9)
    fill(store, Ceilings("cpu", "fp32"), macs_per_s=1e12, bytes_per_s=1e10)
    for task, rate, share in (("training", 100.0, "30"), ("sampling", 10.0, "8")):
        (stage,) = speed.stages(TABLE_1, [DICO], "cpu", task, named=False)
        fill(store, stage, **timed(rate, 1.0))
        assert speed.speed_sheet(TABLE_1, [DICO], "cpu", task, store).rows[0][4].text() == share


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ((2.8, 2.8, 2.7, 3.0), "holds"),
        ((1.4, 1.5, 1.4, 2.66), "holds only as published"),
        ((1.4, 2.7, 1.4, 2.7), "holds only in tf32 and as_published"),
        ((1.4, 1.5, 1.4, 1.9), "does not hold"),
    ],
)
def test_verdicts_name_the_modes_in_which_a_claim_holds(
    tmp_path: Path, measured: tuple[float, ...], said: str
):
    store = Store(tmp_path)
    for stage, ratio in zip(speed_claims.claim_stages(CLAIM, "cuda"), measured, strict=True):
        assert (stage.backbone.name, stage.baseline.name, stage.size) == ("dico_xl", "dit_xl_2", 32)
        fill(store, stage, **timed(100.0, ratio))
    assert (
        speed_claims.verdict(speed_claims.ratios(CLAIM, "cuda", store, store.here), "cuda") == said
    )


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (3, "does not hold; not measured in as_published"),
        (1, "does not hold; not measured in tf32, bf16, as_published"),
    ],
)
def test_a_verdict_names_the_modes_that_lack_a_record(tmp_path: Path, modes: int, said: str):
    store, stages = Store(tmp_path), speed_claims.claim_stages(CLAIM, "cuda")
    for stage in stages[:modes]:
        fill(store, stage, **timed(100.0, 1.4))
    store.append(stages[-1], "failed", {}, {}, "RuntimeError: no room")
    assert (
        speed_claims.verdict(speed_claims.ratios(CLAIM, "cuda", store, store.here), "cuda") == said
    )


def test_what_the_paper_timed_stands_beside_a_forward_pass_alone(tmp_path: Path):
    sheets = {
        what: speed.speed_sheet(TABLE_1, [DICO], "cuda", what, Store(tmp_path))
        for what in speed.TASKS
    }
    assert {
        what
        for what, sheet in sheets.items()
        if any("paper" in group for group, _ in sheet.columns)
    } == {"forward"}
    assert all(len(row) == len(sheet.columns) for sheet in sheets.values() for row in sheet.rows)


def test_what_is_timed_otherwise_than_in_its_paper_is_said(tmp_path: Path):
    store, rows = (
        Store(tmp_path),
        [TABLE_1.row(label) for label in ("ADM-U", "U-ViT-H/2", "DiMSUM-L/2", "DiCo-S")],
    )
    for stage in speed.stages(TABLE_1, rows, "cuda", "forward", named=True):
        fill(
            store,
            stage,
            **timed(10.0, 1.0),
            one_condition=stage.backbone.name != "uvit_h_2" and stage.precision == "as_published",
        )
    notes = {
        what: " ".join(speed.speed_sheet(TABLE_1, rows, "cuda", what, store).notes)
        for what in speed.TASKS
    }
    assert (
        "U-ViT-H/2, as_published: makes tokens of t and y" in notes["forward"]
        and notes["forward"].count("makes tokens") == 1
    )
    assert all(
        ("DiMSUM-L/2: timed as predictors of noise" in notes[what]) == (what != "forward")
        for what in notes
    )
    assert [what for what in notes if "ADM-U: without a null label" in notes[what]] == ["sampling"]


def test_an_error_can_carry_a_claim(tmp_path: Path):
    store = Store(tmp_path)
    stage = speed_claims.claim_stages(CLAIM, "cuda")[0]
    fill(store, stage, **timed(100.0, 2.5, 0.1))
    assert [ratio.holds for ratio in speed_claims.ratios(CLAIM, "cuda", store, store.here)] == [
        True
    ]


def test_a_claim_about_a_network_that_nobody_described_is_not_timed():
    assert speed_claims.claim_stages(CLAIM | {"baseline": "DiS-XL@512"}, "cuda") == []


def test_the_committed_counts_judge_the_claims_about_gflops():
    verdicts = {
        row[0].label: row[3].label
        for row in speed_claims.claims_sheet("cuda", Store(), Store().reference).rows
    }
    assert verdicts["gflops-xl-256"] == verdicts["gflops-family"] == "holds" and len(verdicts) == 10
    assert verdicts["speed-dis-xl-512"].startswith("not measurable")


def test_a_sweep_stops_where_larger_batches_do_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rates = {1: 10.0, 2: 15.0, 4: 15.1, 8: 15.0, 16: 60.0}
    monkeypatch.setattr(
        execute.timing, "measure_speed", lambda stage: timed(rates[stage.batch], 1.0)
    )
    arguments = [
        "--table",
        "1",
        "--sweep",
        "--rows",
        "DiCo-S",
        "--device",
        "cpu",
        "--cluster",
        "debug",
        "--results",
        str(tmp_path),
    ]
    for _ in range(2):  # the second finds it done
        assert efficiency.main(arguments) == 0
        printed = capsys.readouterr().out
        assert "fp32: best at batch 4, 15.1 images a second" in printed and "60.0" not in printed
        assert len(list((tmp_path / "records" / "timing").iterdir())) == 4


@pytest.mark.parametrize(
    "fast", [{"compile": True}, {"graphs": True}, {"compile": True, "graphs": True}]
)
def test_timings_of_compiled_or_recorded_networks_have_ids_and_sheets_of_their_own(
    fast: dict[str, bool], tmp_path: Path
):
    store = Store(tmp_path)
    for given in (
        lambda **how: speed.stages(TABLE_1, [DICO], "cuda", "sampling", False, **how),
        lambda **how: [
            stage
            for sweep in speed.sweeps(DICO, TABLE_1.baseline, "cuda", "training", **how)
            for stage in sweep.stages
        ],
        lambda **how: speed.figure_3("cuda", **how),
    ):
        eager, others = given(), given(**fast)
        assert [replace(stage, compile=False, graphs=False) for stage in others] == [
            stage for stage in eager if stage.precision != "as_published"
        ]
        assert all(
            (stage.compile, stage.graphs) == ("compile" in fast, "graphs" in fast)
            for stage in others
        ) and len(others) < len(eager)
        for stage, rate in ((eager[0], 10.0), (others[0], 40.0)):
            fill(store, stage, **timed(rate, 1.0))
    for sheet in (
        lambda **how: speed.speed_sheet(TABLE_1, [DICO], "cuda", "sampling", store, **how),
        lambda **how: speed.sweep_sheet(DICO, TABLE_1.baseline, "cuda", "training", store, **how),
        lambda **how: speed.runtime_sheet("cuda", store, **how),
    ):
        (usual, eager), (title, own) = (
            (found.title, {cell.value for row in found.rows for cell in row})
            for found in (sheet(), sheet(**fast))
        )
        assert (
            title != usual
            and ("compiled" in title) == ("compile" in fast)
            and ("CUDA graphs" in title) == ("graphs" in fast)
        )
        assert (
            {10.0, 100.0} & eager
            and {40.0, 25.0} & own
            and not {40.0, 25.0} & eager
            and not {10.0, 100.0} & own
        )


def test_the_command_times_and_prints_what_its_options_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        execute.timing, "measure_speed", lambda stage: timed(8.0 if stage.compile else 4.0, 1.0)
    )
    monkeypatch.setattr(
        execute.ceilings, "measure_ceilings", lambda stage: dict(macs_per_s=1e12, bytes_per_s=1e10)
    )
    for options, rate in (
        ([], "4.0 ±1.0"),
        (["--compile"], "8.0 ±1.0"),
        (["--report"], "4.0 ±1.0"),
        (["--compile", "--report"], "8.0 ±1.0"),
    ):
        assert (
            efficiency.main(
                [
                    "--table",
                    "1",
                    "--rows",
                    "DiCo-S",
                    "--device",
                    "cpu",
                    "--cluster",
                    "debug",
                    "--results",
                    str(tmp_path),
                    *options,
                ]
            )
            == 0
        )
        assert re.findall(r"[48]\.0 ±1\.0", capsys.readouterr().out) == [rate]


def test_a_sweep_goes_on_where_it_stopped_and_ends_where_a_batch_does_not_fit(tmp_path: Path):
    store, (sweep,) = Store(tmp_path), speed.sweeps(DICO, TABLE_1.baseline, "cpu", "forward")
    assert sweep.left(store) == sweep and [stage.batch for stage in sweep.stages] == [
        1,
        2,
        4,
        8,
        16,
    ]
    store.append(sweep.stages[0], "failed", {}, {}, "RuntimeError: a busy device")
    assert sweep.left(store).stages == sweep.stages and sweep.failed(
        [store.here.latest(sweep.stages[0], status="failed")]
    )
    for stage, rate in zip(sweep.stages, (10.0, 20.0), strict=False):
        fill(store, stage, **timed(rate, 1.0))
    left = sweep.left(store)
    assert [stage.batch for stage in left.stages] == [4, 8, 16] and not left.failed(left.before)
    slow = [
        store.append(stage, "done", timed(rate, 1.0), {})
        for stage, rate in zip(left.stages, (1.0, 20.3), strict=False)
    ]
    assert not left.ended([*left.before, slow[0]]) and left.ended([*left.before, *slow])
    large = store.append(left.stages[0], "failed", {}, {}, "OutOfMemoryError: a large batch")
    assert (
        left.ended([*left.before, large])
        and not left.failed([*left.before, large])
        and not sweep.left(store).stages
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--table", "1"],
        ["--table", "2"],
        ["--claims"],
        ["--figure", "3"],
        ["--profile", "DiCo-S"],
        ["--table", "1", "--sweep", "--rows", "DiCo-S"],
    ],
)
def test_a_plan_for_a_cluster_gives_every_network_a_gpu_to_itself(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    assert (
        efficiency.main(
            [*arguments, "--cluster", "slurm", "--dry-run", "--results", str(tmp_path / "results")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    jobs = int(re.search(r"an array of (\d+) jobs", printed).group(1))
    assert (
        f"#SBATCH --array=0-{jobs - 1}%1\n" in printed
        and "#SBATCH --gpus-per-node=1\n" in printed
        and "#SBATCH --ntasks-per-node=1\n" in printed
    )
    assert (
        len(set(re.findall(r"^\w{16}  (?:timing|ceilings|profile) +(.+?)  ", printed, re.M)))
        == jobs
        and not (tmp_path / "results").exists()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "1", "--sweep"], "--sweep goes with"),
        (["--counts", "--task", "training"], "--task goes with"),
        (["--claims", "--modes", "bf16"], "--modes goes with"),
        (
            ["--table", "1", "--modes", "bf16", "--device", "cpu"],
            "bf16 is no numeric mode of cpu; known: fp32",
        ),
        (["--claims", "--compile"], "--compile and --graphs go with"),
        (["--table", "1", "--graphs", "--device", "cpu"], "CUDA graphs need a GPU"),
        (["--profile", "DiCo-S", "--graphs"], "--compile and --graphs go with"),
        (
            ["--table", "1", "--graphs", "--modes", "as_published", "--device", "cuda"],
            "as_published is no numeric mode of cuda, by CUDA graphs; known: fp32, tf32, bf16",
        ),
        (["--table", "8"], "invalid choice"),
        ([], "is required"),
    ],
)
def test_contradictions_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert efficiency.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and said in printed


def test_an_unknown_row_lists_the_known(capsys: pytest.CaptureFixture[str]):
    assert efficiency.main(["--profile", "DiCo-Z"]) == 2
    assert "known: 'ADM-U'" in capsys.readouterr().err


def test_a_profile_counts_what_the_network_computes_and_leaves_a_trace(tmp_path: Path):
    values = profiling.profile_task(Profile(SMALL), tmp_path)
    classes = values["classes"]
    assert (tmp_path / values["trace"]).stat().st_size > 1000
    assert (
        classes["depthwise convolution"]["calls"] == 5 and classes["normalisation"]["calls"] == 11
    )
    counted = sum(one["macs"] for one in classes.values())
    expected = cost.count_backbone(
        Cost(SMALL.backbone, SMALL.size, SMALL.channels, SMALL.num_classes)
    )["macs_core"]
    assert counted == 2 * expected  # a batch of two
    training = profiling.profile_task(Profile(replace(SMALL, what="training")), tmp_path)["classes"]
    assert (
        training["optimiser and EMA"]["calls"] >= 2
        and 2.5 < sum(one["macs"] for one in training.values()) / counted <= 3
    )


def test_one_rule_tells_classes_apart():
    x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    with Operators(torch.device("cpu")) as operators:
        F.gelu(F.conv2d(x, w, groups=4)).sum().backward()
    assert {"depthwise convolution", "elementwise", "reduction"} <= set(operators.classes)
    assert (
        operators.classes["depthwise convolution"]["macs"] == 3 * 4 * 9 * 9
        and operators.classes["depthwise convolution"]["calls"] == 2
    )
