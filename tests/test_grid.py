"""Sample grids: images of a run in their own order, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis import grid
from experiments.ablation import TABLE_4
from experiments.engine.execute import execute
from experiments.engine.store import Store
from experiments.engine.train import Resources
from experiments.protocols import DIGITS, IMAGENET256, evaluate_stage, train_stage

SHORT = replace(DIGITS, recipe=replace(DIGITS.recipe, steps=2, warmup=1), sampler=replace(DIGITS.sampler, num_steps=2), num=20)


def test_a_grid_is_one_image_of_a_finished_run(tmp_path: Path):
    store = Store(tmp_path)
    row = TABLE_4.rows[0]
    assert execute(train_stage(row, SHORT, 0), store, Resources(device="cpu"), lambda *progress: None).status == "done"
    grid.draw(evaluate_stage(row, SHORT, 0), store, columns=10, rows=2, name="a")
    grid.draw(evaluate_stage(row, SHORT, 0), store, columns=4, rows=5, name="b")
    samples = tmp_path / "figures" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]
    assert (samples / "a.png").read_bytes()[:4] == b"\x89PNG" and (samples / "a.png").read_bytes() != (samples / "b.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, words",
    [(["--row", "DiCo-Z"], "no row 'DiCo-Z'; known: 'DiCo-S'"), (["--row", "DWC 5x5", "--seed", "7"], "train it with: python experiments/ablation.py --table 4 --rows 'DWC 5x5'")],
)
def test_what_does_not_exist_is_one_line(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["grid", "--table", "4", "--results", str(tmp_path), *arguments])
    assert grid.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and not list(tmp_path.iterdir())


def test_latents_are_not_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match="latents of 4 channels"):
        grid.draw(evaluate_stage(TABLE_4.rows[0], IMAGENET256, 0), Store(tmp_path), columns=2, rows=2, name="a")
