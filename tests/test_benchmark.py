"""The benchmark of precision and recall measures, counts pairs as it says and records."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import benchmark
from experiments.benchmark import Neighbours
from experiments.engine.store import Store


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def call(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--neighbours", "--results", str(tmp_path), *map(str, arguments)])
        return benchmark.main()

    return call


def test_both_arithmetics_are_timed_and_recorded(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--sizes", 61, 37, 19) == 0
    assert capsys.readouterr().out.count("61 x 37 x 19 in ") == 2
    store = Store(tmp_path)
    for arithmetic in ("exact", "half"):
        values = store.latest(Neighbours(arithmetic, "cpu", 61, 37, 19)).values
        assert values["pairs_per_s"] * values["seconds"] == pytest.approx(61 * 61 + 37 * 37 + 61 * 37)
        assert values["gmacs_per_s"] * 1e9 == pytest.approx(19 * values["pairs_per_s"])
        assert values["share_of_product"] == pytest.approx(values["gmacs_per_s"] / values["product_gmacs_per_s"])
        assert 0 < values["precision"] <= 1 and 0 < values["recall"] <= 1


@pytest.mark.parametrize("sizes", [(3, 37, 19), (61, 3, 19), (61, 37, 0)])
def test_sizes_without_neighbours_are_one_line(run, sizes: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--sizes", *sizes) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --sizes takes more than 3") and err.count("\n") == 1 and not list(tmp_path.glob("records/*"))
