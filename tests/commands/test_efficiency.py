"""The command that counts, times and profiles: what it runs, prints and refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import efficiency
from experiments.declared import timings
from experiments.engine.jobs import execute
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone, Cost, Profile, Timing
from experiments.engine.timing import cost
from experiments.engine.timing import profile as profiling
from experiments.engine.timing.operators import Operators
from experiments.main_results import TABLE_1
from tests.support.timings import record_values, timing_values

DICO = TABLE_1.row("DiCo-S")
SMALL = Timing(Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1))), 8, 3, 5, 2, "cpu")


def test_a_sweep_stops_where_larger_batches_do_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rates = {1: 10.0, 2: 15.0, 4: 15.1, 8: 15.0, 16: 60.0}
    monkeypatch.setattr(
        execute.timing, "measure_speed", lambda stage: timing_values(rates[stage.batch], 1.0)
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
        assert "fp32: best at batch 4, 15.1 images per second" in printed and "60.0" not in printed
        assert len(list((tmp_path / "records" / "timing").iterdir())) == 4


def test_the_command_times_and_prints_what_its_options_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        execute.timing,
        "measure_speed",
        lambda stage: timing_values(8.0 if stage.compile else 4.0, 1.0),
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
    store = Store(tmp_path)
    (sweep,) = timings.sweeps(timings.swept_row(DICO, TABLE_1.baseline, "cpu", "forward"))
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
        record_values(store, stage, **timing_values(rate, 1.0))
    left = sweep.left(store)
    assert [stage.batch for stage in left.stages] == [4, 8, 16] and not left.failed(left.before)
    slow = [
        store.append(stage, "done", timing_values(rate, 1.0), {})
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
