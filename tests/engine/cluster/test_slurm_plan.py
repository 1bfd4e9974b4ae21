"""A plan on Slurm: its arrays, its cost, and what is refused before submission."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import ablation, run
from experiments.ablation import TABLES
from experiments.declared.protocols import DIGITS, IMAGENET256, PROTOCOLS
from experiments.engine.cli import main
from experiments.engine.cluster import slurm
from experiments.engine.jobs import plan
from experiments.engine.jobs.estimate import seconds_per_image
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Evaluate
from experiments.engine.specs.stages import Protocol, cost_stage, train_stage
from tests.support.commands import call
from tests.support.plans import TABLE, site_file, two_rows

PAPERS_TIME = "the paper's training time on A100 (Table 6)"
PAPERS_SECONDS = 8 * 11 * 3600 / (400_000 * 256)  # of a GPU per image of DiCo-S


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"DICO_SLURM_NODES": "3"},
            "DiCo-S, seed 0: 3 nodes of 8 processes do not divide the batch of 256",
        ),
        (
            {"DICO_SLURM_TIME": "0:05:00"},
            "a time limit of 0:05:00 is shorter than one checkpoint interval",
        ),
    ],
)
def test_what_cannot_work_is_known_before_it_is_submitted(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        slurm.arrays(two_rows(), Store(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_training_and_its_evaluation_are_one_job_and_a_timing_is_its_own(tmp_path: Path):
    timing, training = slurm.arrays(two_rows(), Store(tmp_path))
    assert (timing.site.world_size, training.site.world_size) == (1, 8)
    kinds = [[type(stage).__name__ for stage in job.stages] for job in timing.jobs + training.jobs]
    assert kinds == [["Timing"]] * 2 + [["Train", "Evaluate"]] * 2


def test_rows_with_resources_of_their_own_are_an_array_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment = site_file(tmp_path, '[rows."GELU->ReLU"]\nnodes = 2\n')
    monkeypatch.setenv("DICO_SLURM_SITE", environment["DICO_SLURM_SITE"])
    _, *trainings = slurm.arrays(two_rows(), Store(tmp_path))
    assert [(array.site.nodes, [job.label for job in array.jobs]) for array in trainings] == [
        (1, ["DiCo-S, seed 0"]),
        (2, ["GELU->ReLU, seed 0"]),
    ]


def test_what_one_table_submitted_another_does_not_cancel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["experiments/ablation.py"])
    first, second = (
        TablePlan(Selection(TABLES[number], [TABLES[number].row(label)], DIGITS, [0], "cpu"))
        for number, label in ((3, "DiT (U-shape)"), (4, "CM->Self-Attn"))
    )
    assert first.trainings()[0].stages == second.trainings()[0].stages
    assert slurm.experiment_of(first) != slurm.experiment_of(second)


def test_rows_of_one_training_are_one_job_whose_evaluations_all_run(tmp_path: Path):
    table = run.TABLES[2]
    rows = [table.row(label) for label in ("DiCo-XL, 3M", "DiT-XL/2, 3M", "DiCo-XL (w/ CFG)")]
    first, second = TablePlan(
        Selection(table, rows, PROTOCOLS["imagenet512_own"], [0], "cuda")
    ).trainings()
    assert (first.label, second.label) == ("DiCo-XL, 3M, seed 0", "DiT-XL/2, 3M, seed 0")
    assert [type(stage).__name__ for stage in second.stages] == ["Train", "Evaluate"]

    train, unguided, guided = first.stages
    assert first.label_of(train) == first.label_of(unguided) == "DiCo-XL, 3M, seed 0"
    assert first.label_of(guided) == "DiCo-XL (w/ CFG), seed 0"
    assert isinstance(unguided, Evaluate) and isinstance(guided, Evaluate)
    assert unguided != guided and unguided.train == guided.train == train

    # An evaluation that fails does not keep the other from running; a training does.
    store = Store(tmp_path)
    done = store.append(train, "done", {}, {})
    assert not first.ended([done, store.append(unguided, "failed", {}, {}, "an error")])
    assert first.ended([store.append(train, "failed", {}, {}, "an error")])


# ---- Expected cost


def expected(
    label: str, table: int, protocol: Protocol, store: Store, device: str = "cuda"
) -> tuple[float, str] | None:
    """Return the seconds of a GPU per image, and their source."""
    declared = run.TABLES[table]
    selection = Selection(declared, declared.rows, protocol, [0], device)
    return seconds_per_image(declared.row(label), selection, store)


def test_expected_cost_comes_from_the_paper_without_records(tmp_path: Path):
    store, own = Store(tmp_path), PROTOCOLS["imagenet512_own"]
    assert expected("DiCo-S", 4, IMAGENET256, store) == (PAPERS_SECONDS, PAPERS_TIME)
    after_3m = expected("DiCo-XL, 3M", 2, own, store)
    assert after_3m == expected("DiCo-XL (w/ CFG)", 2, own, store)
    assert after_3m and after_3m[1] == PAPERS_TIME

    # Without counts another row cannot be scaled, and on a CPU the paper says nothing.
    assert expected("GELU->ReLU", 4, IMAGENET256, store) is None
    assert expected("DiCo-S", 4, DIGITS, store) is None
    assert expected("DiCo-S", 4, IMAGENET256, store, "cpu") is None


def test_expected_cost_is_scaled_by_counted_gflops(tmp_path: Path):
    store = Store(tmp_path)
    for label, macs in (("DiCo-S", 4e9), ("GELU->ReLU", 5e9), ("DWC 5x5", 6e9)):
        store.append(cost_stage(TABLE.row(label)), "done", {"macs_core": macs}, {})
    assert expected("GELU->ReLU", 4, IMAGENET256, store) == (
        pytest.approx(PAPERS_SECONDS * 5 / 4),
        f"{PAPERS_TIME} of DiCo-S, scaled by counted Gflops",
    )

    # Recorded throughput goes before the paper's, and that of the row itself before others'.
    def record(label: str, seed: int, rate: float, world_size: int) -> None:
        provenance = {"device": "H200", "world_size": world_size}
        stage = train_stage(TABLE.row(label), IMAGENET256, seed)
        store.append(stage, "done", {"images_per_s": rate}, provenance)

    record("DiCo-S", 1, 4000.0, world_size=4)
    on_h200 = "recorded throughput on H200"
    assert expected("DiCo-S", 4, IMAGENET256, store) == (pytest.approx(1e-3), on_h200)
    assert expected("DWC 5x5", 4, IMAGENET256, store) == (
        pytest.approx(1.5e-3),
        f"{on_h200} of DiCo-S, scaled by counted Gflops",
    )
    record("DWC 5x5", 0, 1000.0, world_size=1)
    both = expected("GELU->ReLU", 4, IMAGENET256, store)
    assert both and both[0] == pytest.approx((1e-3 * 5 / 4 + 1e-3 * 5 / 6) / 2)


def test_a_plan_says_what_every_own_recipe_costs_or_that_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A plan names every training with the GPU-hours of its recipe, and never with zero."""
    environment = site_file(tmp_path, "checkpoint_every = 1")
    monkeypatch.setenv("DICO_SLURM_SITE", environment["DICO_SLURM_SITE"])
    store = Store(tmp_path, REPOSITORY / "results" / "reference")
    table = run.TABLES[8]
    runs = TablePlan(Selection(table, table.rows, PROTOCOLS["imagenet256_own"], [0], "cuda"))

    # The hours by label, or nothing where they are unknown.
    known = r"about (\S+) GPU-hours of training, by .*Table 6"
    line = rf"^(.+), seed 0: (?:{known}|GPU-hours of training unknown)"
    costs = dict(re.findall(line, slurm.describe(runs, store), re.M))
    assert {f"{label}, seed 0" for label in costs} == {job.label for job in runs.trainings()}
    assert costs["DiCo-H"] == f"{64 * 113:,}"
    assert "" in costs.values()
    assert not {"0", "0.0"} & set(costs.values())


def test_a_gpu_is_not_promised_the_seconds_of_a_cpu(tmp_path: Path):
    """The seconds of a CPU are a forecast for CPUs alone."""
    store = Store(tmp_path)
    train = two_rows(DIGITS).trainings()[0].stages[0]
    store.append(train, "failed", {}, {}, "so that it would run again")
    on_cpu = {"device": "cpu", "world_size": 1, "seconds": 77.0}
    store.append(replace(train, seed=1), "done", {}, on_cpu)

    # The same plan for either device.
    reference = Store(tmp_path, reference=tmp_path / "records")
    plans = {}
    for device in ("cpu", "cuda"):
        selection = Selection(TABLE, TABLE.rows[:1], DIGITS, [0, 1], device)
        plans[device] = plan.describe(TablePlan(selection), reference)
    assert "about" in plans["cpu"]
    assert "stages of unknown length" in plans["cuda"].splitlines()[-1]
    assert not re.search(r"train .*about", plans["cuda"])


def test_variables_that_override_the_site_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = "\nvariables of this shell that override the text above: SBATCH_PARTITION=high\n"
    assert line not in slurm.describe(two_rows(), Store(tmp_path))
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    assert line in slurm.describe(two_rows(), Store(tmp_path))


# ---- The command


def test_resources_for_a_row_that_no_table_declares_are_reported_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    environment = site_file(tmp_path, '[rows."DiCo-Q"]\nnodes = 2\n')
    monkeypatch.setenv("DICO_SLURM_SITE", environment["DICO_SLURM_SITE"])
    arguments = ["--table", "4", "--cluster", "slurm", "--dry-run", "--results", str(tmp_path)]
    assert main(TABLES, PROTOCOLS, None, arguments) == 0
    assert "warning: the site file has resources for 'DiCo-Q'" in capsys.readouterr().err


def test_results_go_where_the_environment_says_unless_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RESULTS", str(tmp_path / "a"))
    arguments = ["--table", "4", "--rows", "DiCo-S", "--cluster", "slurm", "--dry-run"]
    for options, folder in (([], "a"), (["--results", str(tmp_path / "b")], "b")):
        assert main(TABLES, PROTOCOLS, None, [*arguments, *options]) == 0
        assert f"SUBMITTED_FROM={tmp_path / folder}\n" in capsys.readouterr().out


def test_a_device_that_the_site_lacks_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    arguments = ["--table", "4", "--cluster", "slurm", "--device", "cpu", "--dry-run"]
    assert main(TABLES, PROTOCOLS, None, arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: --device cpu contradicts the site file, .* on cuda; .*\n", error)


def test_without_slurm_it_is_said_and_nothing_is_written(tmp_path: Path):
    environment = {"PATH": str(tmp_path), "DICO_SLURM_GPUS_PER_NODE": "0"}
    results = tmp_path / "results"
    script = Path(ablation.__file__)
    options = ["--table", 4, "--cluster", "slurm", "--results", results]
    done = call(script, *options, environment=environment)
    assert (done.returncode, done.stdout) == (2, "") and not results.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no Slurm on this machine (sbatch, squeue, srun, scancel not")
