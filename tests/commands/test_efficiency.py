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
from experiments.engine.reporting.efficiency.inference.predicted import (
    InferenceNeeds,
    write_inference,
)
from experiments.engine.reporting.efficiency.memory import Line
from experiments.engine.specs.spec import Backbone, Cost, Profile, Timing
from experiments.engine.timing import cost
from experiments.engine.timing import profile as profiling
from experiments.engine.timing.operators import Operators
from experiments.main_results import TABLE_1
from tests.support.timings import record_values, timing_values

DICO = TABLE_1.row("DiCo-S")
SMALL = Timing(Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1))), 8, 3, 5, 2, "cpu")


def on_cpu(results: Path, *options: str) -> list[str]:
    """Return the arguments that time DiCo-S of table 1 on this CPU."""
    row = ["--table", "1", "--rows", "DiCo-S"]
    place = ["--device", "cpu", "--cluster", "debug", "--results", str(results)]
    return [*row, *place, *options]


def test_a_sweep_stops_where_larger_batches_do_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two doublings that gain nothing end a sweep, and it stays ended."""
    rates = {1: 10.0, 2: 15.0, 4: 15.1, 8: 15.0, 16: 60.0}

    def measure(stage: Timing) -> dict[str, object]:
        return timing_values(rates[stage.batch], 1.0)

    # The second call finds the sweep done.
    monkeypatch.setattr(execute.timing, "measure_speed", measure)
    for _ in range(2):
        assert efficiency.main(on_cpu(tmp_path, "--sweep")) == 0
        printed = capsys.readouterr().out
        assert "fp32: best at batch 4, 15.1 images per second" in printed
        assert "60.0" not in printed
        assert len(list((tmp_path / "records" / "timing").iterdir())) == 4


@pytest.mark.slow
def test_the_command_times_and_prints_what_its_options_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Compiled and plain timings are told apart, when they are made and when they are read."""

    def measure(stage: Timing) -> dict[str, object]:
        return timing_values(8.0 if stage.compile else 4.0, 1.0)

    ceilings = dict(macs_per_s=1e12, bytes_per_s=1e10)
    monkeypatch.setattr(execute.timing, "measure_speed", measure)
    monkeypatch.setattr(execute.ceilings, "measure_ceilings", lambda stage: ceilings)

    # Time both, then report both from their records.
    for options, rate in (
        ([], "4.0 ±1.0"),
        (["--compile"], "8.0 ±1.0"),
        (["--report"], "4.0 ±1.0"),
        (["--compile", "--report"], "8.0 ±1.0"),
    ):
        assert efficiency.main(on_cpu(tmp_path, *options)) == 0
        assert re.findall(r"[48]\.0 ±1\.0", capsys.readouterr().out) == [rate]


def test_latency_of_a_table_is_measured_once_and_set_beside_the_traced_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The second call finds the latency done; a table shows each network once."""
    values = dict(latency_s=0.0125, latency_p95_s=0.02, stable=True)
    values |= dict(peak_memory_bytes_one=2**28, peak_memory_bytes_batch=3 * 10**8)
    monkeypatch.setattr(execute.latency, "measure_latency", lambda stage: values)
    needs = InferenceNeeds("4", "DiCo-S", "fp32", 10**8, (Line(2 * 10**7, 4 * 10**7),))
    write_inference(tmp_path, [needs])
    command = ["--table", "4", "--task", "latency", "--rows", "DiCo-S"]
    place = ["--device", "cpu", "--cluster", "debug", "--results", str(tmp_path)]
    for _ in range(2):
        assert efficiency.main([*command, *place]) == 0
        (row,) = re.findall(r"^4: DiCo-S.*$", capsys.readouterr().out, re.M)
        assert re.findall(r"[\d.]+", row.partition("|")[2]) == (
            ["12.5", "20.0", "0.268", "0.300", "0.93"]
        )
    assert len(list((tmp_path / "records" / "latency").iterdir())) == 1
    assert len(timings.latency_rows(TABLE_1, TABLE_1.rows, "cuda")) < len(
        [row for row in TABLE_1.rows if row.backbone]
    )


def test_a_sweep_goes_on_where_it_stopped_and_ends_where_a_batch_does_not_fit(tmp_path: Path):
    """Records decide which batches are left, and whether the sweep has ended or failed."""
    store = Store(tmp_path)
    row = timings.swept_row(DICO, TABLE_1.baseline, "cpu", "forward")
    (sweep,) = timings.sweeps(row)
    assert sweep.left(store) == sweep
    assert [stage.batch for stage in sweep.stages] == [1, 2, 4, 8, 16]

    # A failure at the first batch is tried again.
    store.append(sweep.stages[0], "failed", {}, {}, "RuntimeError: a busy device")
    failure = store.here.latest(sweep.stages[0], status="failed")
    assert sweep.left(store).stages == sweep.stages
    assert sweep.failed([failure])

    # Two batches are recorded.
    record_values(store, sweep.stages[0], **timing_values(10.0, 1.0))
    record_values(store, sweep.stages[1], **timing_values(20.0, 1.0))
    left = sweep.left(store)
    assert [stage.batch for stage in left.stages] == [4, 8, 16]
    assert not left.failed(left.before)

    # One batch that gains nothing does not end the sweep, and a second one does.
    slow = store.append(left.stages[0], "done", timing_values(1.0, 1.0), {})
    hardly_faster = store.append(left.stages[1], "done", timing_values(20.3, 1.0), {})
    assert not left.ended([*left.before, slow])
    assert left.ended([*left.before, slow, hardly_faster])

    # A batch that does not fit ends it, and is no failure.
    error = "OutOfMemoryError: a large batch"
    too_large = store.append(left.stages[0], "failed", {}, {}, error)
    assert left.ended([*left.before, too_large])
    assert not left.failed([*left.before, too_large])
    assert not sweep.left(store).stages


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
    """Every network is an element of an array, of which one runs at a time, on one GPU."""
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    results = tmp_path / "results"
    plan = ["--cluster", "slurm", "--dry-run", "--results", str(results)]
    assert efficiency.main([*arguments, *plan]) == 0
    printed = capsys.readouterr().out

    # The batch script asks for one process with one GPU.
    jobs = int(re.search(r"an array of (\d+) jobs", printed).group(1))
    assert f"#SBATCH --array=0-{jobs - 1}%1\n" in printed
    assert "#SBATCH --gpus-per-node=1\n" in printed
    assert "#SBATCH --ntasks-per-node=1\n" in printed

    # Every job has a label of its own, and a plan writes nothing.
    labels = re.findall(r"^\w{16}  (?:timing|ceilings|profile) +(.+?)  ", printed, re.M)
    assert len(set(labels)) == jobs
    assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "1", "--sweep"], "--sweep goes with"),
        (["--counts", "--task", "training"], "--task goes with"),
        (["--claims", "--modes", "bf16"], "--modes goes with"),
        (["--profile", "DiCo-S", "--task", "latency"], "--task latency goes with --table 1"),
        (
            ["--table", "3", "--task", "training"],
            "--table 3 goes with --task latency; experiments/ablation.py --table 3 times its rows",
        ),
        (["--table", "ternary"], "--table ternary goes with --task latency; --help lists"),
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
    """Options that contradict each other are one line of error."""
    assert efficiency.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert said in printed


def test_an_unknown_row_lists_the_known(capsys: pytest.CaptureFixture[str]):
    assert efficiency.main(["--profile", "DiCo-Z"]) == 2
    assert "known: 'ADM-U'" in capsys.readouterr().err


def test_a_profile_counts_what_the_network_computes_and_leaves_a_trace(tmp_path: Path):
    """The operations of all classes add up to the network's count; a training has three times."""
    values = profiling.profile_task(Profile(SMALL), tmp_path)
    classes = values["classes"]
    assert (tmp_path / values["trace"]).stat().st_size > 1000
    assert classes["depthwise convolution"]["calls"] == 5
    assert classes["normalisation"]["calls"] == 11

    # Against the count of one image; the batch has two.
    image = Cost(SMALL.backbone, SMALL.size, SMALL.channels, SMALL.num_classes)
    expected = cost.count_backbone(image)["macs_core"]
    counted = sum(of_class["macs"] for of_class in classes.values())
    assert counted == 2 * expected

    # A step of training has up to two backward passes' work, and an optimiser.
    training = profiling.profile_task(Profile(replace(SMALL, what="training")), tmp_path)["classes"]
    of_training = sum(of_class["macs"] for of_class in training.values())
    assert training["optimiser and EMA"]["calls"] >= 2
    assert 2.5 < of_training / counted <= 3


def test_one_rule_tells_classes_apart():
    """A depthwise convolution counts its forward and both of its backward passes."""
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    w = torch.randn(4, 1, 3, 3, requires_grad=True)
    with Operators(torch.device("cpu")) as operators:
        F.gelu(F.conv2d(x, w, groups=4)).sum().backward()
    assert {"depthwise convolution", "elementwise", "reduction"} <= set(operators.classes)
    convolution = operators.classes["depthwise convolution"]
    assert convolution["macs"] == 3 * 4 * 9 * 9
    assert convolution["calls"] == 2
