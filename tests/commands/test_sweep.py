"""`sweep.py` draws a declared grid, chooses on some sampling seeds and reports on others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import sweep
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.cli import Outcome
from experiments.engine.jobs.plan import Plan
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Evaluate, Sampler, spec_id
from experiments.engine.specs.sweeps import Sweep
from experiments.main_results import TABLE_1
from experiments.sweep import SWEEPS
from tests.support.references import PROVENANCE
from tests.support.score_scripts import Script

GRID = Sweep(
    "tiny",
    TABLE_4.row("DiCo-S"),
    replace(DIGITS, selection_seeds=(5, 6), report_seeds=(7, 8)),
    scales=(1.0, 2.0),
    samplers=("ddim",),
    steps=(5, 10),
)


def distance(stage: Evaluate) -> float:
    """The second scale is best on the selection seeds alone, where ten steps are better."""
    if stage.seed in (5, 6):
        return 10 / stage.sampler.scale - stage.sampler.num_steps / 10 + stage.seed
    return 40.0 + stage.seed


class Machine:
    """Stands for everything that runs jobs: it makes up a record for each stage."""

    def __init__(self) -> None:
        self.phases: list[list[str]] = []
        self.fail_at = ""

    def carry_out(self, plan: Plan, args: argparse.Namespace, store: Store, *_: object) -> Outcome:
        stages = [stage for job in plan.trainings() for stage in job.stages]
        self.phases.append([spec_id(stage) for stage in stages])
        for stage in stages:
            if spec_id(stage) == self.fail_at:
                return Outcome.FAILED
            values = {}
            if isinstance(stage, Evaluate):
                values = {"fd_digits_judge": distance(stage), "nfe": stage.sampler.num_steps}
            store.append(stage, "done", values, PROVENANCE)
        store.refresh()
        return Outcome.DONE


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(sweep, "carry_out", made.carry_out)
    monkeypatch.setitem(SWEEPS, "tiny", GRID)
    return made


@pytest.fixture
def script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    command = Script(sweep, capsys, monkeypatch)
    return lambda *options: command.run("--sweep", "tiny", "--results", tmp_path, *options)


def test_the_best_on_the_selection_seeds_is_reported_on_others(script, machine, tmp_path: Path):
    status, out, _ = script("--plot", tmp_path / "plot.png", "--device", "cpu")
    assert status == 0

    # One training, a record of every point and seed, and the choice on seeds of its own.
    assert [len(phase) for phase in machine.phases] == [1, 8, 2]
    assert len({name for phase in machine.phases for name in phase}) == 11
    note = " ".join(out.split())
    assert "best point on the selection seeds is ddim, 10 steps, scale 2 in 0 to 1000" in note
    assert "On 2 other sampling seeds its fd_digits_judge is 47.500 (deviation 0.707)" in note
    assert "and 9.500 on those that chose it" in note
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    # Running again runs nothing.
    machine.phases.clear()
    assert script("--device", "cpu")[1].splitlines()[0] == out.splitlines()[0]
    assert machine.phases == []


def test_a_sweep_that_stopped_goes_on_and_chooses_nothing_before(script, machine):
    points = GRID.points(0)
    machine.fail_at = spec_id(replace(points[2], seed=6))
    status, out, _ = script("--device", "cpu")
    assert status == 1
    assert "Nothing is chosen before every point is scored" in out
    assert len(machine.phases) == 2

    machine.fail_at = ""
    machine.phases.clear()
    assert script("--device", "cpu")[0] == 0
    assert [len(phase) for phase in machine.phases] == [3, 2]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(samplers=("euler",)), "unknown sampler 'euler'; known: ancestral, ddim"),
        (dict(samplers=("dopri5",), steps=(10, 20)), "has no number of steps"),
        (dict(averages=(0.1,)), "declares power_snapshots"),
        (dict(scales=(), intervals=((0, 500),)), "needs a guidance scale other than 1"),
        (dict(scales=(1.5, 1.5)), "scales hold a value twice"),
        (dict(protocol=replace(GRID.protocol, report_seeds=(6,))), "share none"),
        (dict(row=TABLE_1.row("U-ViT-H/2"), scales=(1.0,)), "unknown sampler"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_one_line_and_runs_nothing(
    changes: dict,
    complaint: str,
    machine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    if "row" in changes:
        changes = changes | {"samplers": ("heun",)}
    monkeypatch.setitem(SWEEPS, "tiny", replace(GRID, **changes))
    error = Script(sweep, capsys, monkeypatch).refuse("--sweep", "tiny", "--results", tmp_path)
    assert error.startswith("error: sweep tiny: ")
    assert complaint in error
    assert machine.phases == []
    assert not list(tmp_path.iterdir())


def test_declared_sweeps_are_drawable_and_keep_the_ids_of_their_protocols():
    for declared in SWEEPS.values():
        points = declared.points(0)
        assert len({spec_id(point) for point in points}) == len(points) > 1
    (point,) = replace(GRID, scales=(), samplers=(), steps=()).points(0)
    assert point.sampler == Sampler(num_steps=50, channels=None)


@pytest.mark.slow
def test_a_sweep_runs_from_training_to_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Three averages of a short training, in this process."""
    recipe = replace(DIGITS.recipe, steps=20, batch=16, power_snapshots=4)
    short = replace(GRID.protocol, recipe=recipe, report_seeds=(7,), selection_seeds=(5,))
    grid = replace(GRID, protocol=short, scales=(), steps=(2,), averages=(None, 0.1, 0.2), num=40)
    monkeypatch.setitem(SWEEPS, "tiny", grid)

    # One call trains, chooses and reports.
    command = Script(sweep, capsys, monkeypatch)
    options = ("--sweep", "tiny", "--results", tmp_path, "--cluster", "debug", "--device", "cpu")
    status, out, _ = command.run(*options)
    assert status == 0
    assert "On 1 other sampling seeds" in " ".join(out.split())

    # Every point has a record; only the protocol's average holds initial weights.
    store = Store(tmp_path)
    records = [store.here.latest(replace(point, seed=5)) for point in grid.points(0)]
    assert [record.values["initial_share"] > 0 for record in records] == [True, False, False]
    assert records[2].values["average"]["width"] == 0.2
