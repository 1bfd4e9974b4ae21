"""The benchmark commands measure what they say, record it, and refuse bad input in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import backbones
from experiments import benchmark
from experiments.engine.benchmarks import loader
from experiments.engine.benchmarks.footprint import measure_footprint, measure_start
from experiments.engine.benchmarks.spec import Loader, Neighbours, Stall
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Run a command with a results folder of its own."""

    def call(command: str, *arguments: object) -> int:
        return benchmark.main([command, "--results", str(tmp_path), *map(str, arguments)])

    return call


def test_both_arithmetics_are_timed_and_recorded(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("loop", "--neighbours", "--sizes", 61, 37, 19) == 0
    assert capsys.readouterr().out.count("61 x 37 x 19 in ") == 2
    for arithmetic in ("exact", "half"):
        values = Store(tmp_path).here.latest(Neighbours(arithmetic, "cpu", 61, 37, 19)).values
        pairs = 61 * 61 + 37 * 37 + 61 * 37
        assert values["pairs_per_s"] * values["seconds"] == pytest.approx(pairs)
        assert values["gmacs_per_s"] * 1e9 == pytest.approx(19 * values["pairs_per_s"])
        share = values["gmacs_per_s"] / values["product_gmacs_per_s"]
        assert values["share_of_product"] == pytest.approx(share)
        assert 0 < values["precision"] <= 1
        assert 0 < values["recall"] <= 1


def test_the_stall_of_a_checkpoint_is_recorded(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The stall is the copy and the slowing beside it, over the steps between two checkpoints."""
    tiny = Backbone("dico_s").but(dim=8, depths=(1, 1, 1, 1, 1))
    spec = Stall(tiny, "cpu", batch=1, every=50)
    monkeypatch.setitem(benchmark.declared.STALLS, "cpu", spec)
    assert run("loop", "--checkpoints") == 0
    assert "stall every 50 steps" in capsys.readouterr().out

    # A checkpoint holds weights, their EMA and both moments of AdamW, in float32.
    values = Store(tmp_path).here.latest(spec).values
    network = backbones.build(tiny.name, **tiny.options)
    weights = sum(weight.numel() for weight in network.parameters())
    assert values["bytes"] > 4 * 4 * weights
    assert values["seconds_copying"] > 0
    lost = values["seconds_copying"] + values["seconds_slowed"]
    assert values["stall"] == pytest.approx(lost / (50 * values["seconds_per_step"]))


@pytest.mark.parametrize("sizes", [(3, 37, 19), (61, 3, 19), (61, 37, 0)])
def test_sizes_without_neighbours_are_refused_in_one_line(
    run: Callable[..., int],
    sizes: tuple[int, int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert run("loop", "--neighbours", "--sizes", *sizes) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --sizes takes more than 3")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("records/*"))


def test_the_loader_is_timed_over_every_latent_it_yields(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """In small: the rate is that of latents counted here, and the temporary set is gone."""
    spec = Loader(size=8, batch=24)
    counts: list[int] = []
    iterate_batches = loader.iterate_batches

    def count_latents(*arguments: Any) -> Iterator[Any]:
        counts.append(0)
        for x, y in iterate_batches(*arguments):
            assert x.shape == (24, 4, 8, 8)
            assert len(y) == 24
            counts[-1] += len(x)
            yield x, y

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(loader, "iterate_batches", count_latents)
    monkeypatch.setattr(benchmark, "Loader", lambda: spec)
    assert run("loader") == 0

    # The first pass reads every page, so that the timed runs find them in memory.
    values = Store(tmp_path).here.latest(spec).values
    assert counts[0] >= 8 * 512 - 24
    assert counts[1:] == [40 * 24] * loader.RUNS
    assert values["runs"] == loader.RUNS
    assert 0 < values["least"] <= values["latents_per_s"] <= values["most"]
    assert values["core_s_each"] > 0
    assert f"latents: {values['latents_per_s']:,.0f} per second" in capsys.readouterr().out
    assert not list(temporary.iterdir())


def test_without_another_implementation_steps_say_what_is_missing(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "experiments.engine.benchmarks.steps.measure_steps", lambda *arguments: True
    )
    assert run("steps", "--networks", "dit_s_2", "--tasks", "sampling") == 0
    assert capsys.readouterr().out == (
        "dit_s_2: without --against dit_s_2=FILE:NAME "
        "no step of another implementation is measured\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["steps", "--rounds", "2"], "--rounds must be at least 3 and --batch at least 1"),
        (["steps", "--networks", "nonet"], "nonet"),
        (["steps", "--against", "dit_s_2=nofile.py:make"], "--against takes BACKBONE=FILE:NAME"),
        (["kernels", "--runs", "1"], "--runs must be at least 2 and --batch at least 1"),
        (["kernels", "--batch", "0"], "--runs must be at least 2 and --batch at least 1"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = ["--results", str(tmp_path)] if command[:1] in (["steps"], ["kernels"]) else []
    assert benchmark.main([*command, *results]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("records/*"))


def test_graphs_on_a_cpu_are_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = tmp_path / "results"
    assert benchmark.main(["steps", "--graphs", "--results", str(results)]) == 2
    assert not results.exists()
    assert "CUDA graphs need a GPU" in capsys.readouterr().err


def test_the_footprint_of_a_command_includes_its_children():
    child = "x = bytearray(64 * 2**20); import time; time.sleep(0.7)"
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    footprint = measure_footprint(["python3", "-c", code])
    assert footprint.status == 0
    assert footprint.seconds > 0.7
    assert 64 * 2**20 < footprint.peak_bytes < 2**30


def test_the_start_of_a_script_says_whether_it_imports_torch(tmp_path: Path):
    script = tmp_path / "script.py"
    for line, imports_torch in (("pass", False), ("import sys; sys.modules['torch'] = 1", True)):
        script.write_text(f"import sys\nassert sys.argv[1:] == ['--report']\n{line}\n")
        seconds, torch_loaded = measure_start(script, ["--report"])
        assert seconds > 0
        assert torch_loaded is imports_torch
