"""The benchmarks of precision and recall and of the loader measure what they say, and record it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import benchmark
from experiments.benchmark import Loader, Neighbours
from experiments.engine.data import sets as data
from experiments.engine.records.store import Store


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def call(*arguments: object) -> int:
        monkeypatch.setattr(
            "sys.argv", ["benchmark.py", "--results", str(tmp_path), *map(str, arguments)]
        )
        return benchmark.main()

    return call


def test_both_arithmetics_are_timed_and_recorded(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--neighbours", "--sizes", 61, 37, 19) == 0
    assert capsys.readouterr().out.count("61 x 37 x 19 in ") == 2
    store = Store(tmp_path)
    for arithmetic in ("exact", "half"):
        values = store.here.latest(Neighbours(arithmetic, "cpu", 61, 37, 19)).values
        assert values["pairs_per_s"] * values["seconds"] == pytest.approx(
            61 * 61 + 37 * 37 + 61 * 37
        )
        assert values["gmacs_per_s"] * 1e9 == pytest.approx(19 * values["pairs_per_s"])
        assert values["share_of_product"] == pytest.approx(
            values["gmacs_per_s"] / values["product_gmacs_per_s"]
        )
        assert 0 < values["precision"] <= 1 and 0 < values["recall"] <= 1


@pytest.mark.parametrize("sizes", [(3, 37, 19), (61, 3, 19), (61, 37, 0)])
def test_sizes_without_neighbours_are_one_line(
    run, sizes: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--neighbours", "--sizes", *sizes) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: --sizes takes more than 3")
        and err.count("\n") == 1
        and not list(tmp_path.glob("records/*"))
    )


def test_the_loader_is_timed_over_every_latent_it_gives(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In small: the rate is that of latents counted here, the record its median, and the temporary set is gone."""
    given, spec = [], Loader(size=8, batch=24)
    make = data.iterate_batches

    def counted(*arguments: Any) -> Iterator[Any]:
        given.append(0)
        for x, y in make(*arguments):
            given[-1] += len(x)
            assert x.shape == (24, 4, 8, 8) and len(y) == 24
            yield x, y

    monkeypatch.setattr(data, "iterate_batches", counted)
    monkeypatch.setattr(benchmark, "Loader", lambda: spec)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "made"))
    (tmp_path / "made").mkdir()
    assert run("--latents") == 0
    values = Store(tmp_path).here.latest(spec).values
    assert (
        values["runs"] == benchmark.PAIRS
        and given[1:] == [40 * 24] * benchmark.PAIRS
        and given[0] >= 8 * 512 - 24
    )  # all pages are warm first
    assert (
        0 < values["least"] <= values["latents_per_s"] <= values["most"]
        and values["core_s_each"] > 0
    )
    assert (
        f"latents: {values['latents_per_s']:,.0f} a second" in capsys.readouterr().out
        and not list((tmp_path / "made").iterdir())
    )
