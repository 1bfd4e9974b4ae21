"""The comparison of small trainings with another tree takes turns and refuses what is no tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments.engine.benchmarks.small import against
from experiments.engine.benchmarks.small.against import (
    Rounds,
    compare,
    find_commit,
    measure_small,
)
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Recipe, Train
from tests.support.trainings import DICO, DIGITS


def git(tree: Path, *command: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(tree), *identity, *command], check=True, capture_output=True)


class Timed:
    """A worker whose every step takes a second here and two seconds elsewhere."""

    turns: list[str] = []

    def __init__(self, tree: Path, training: Train) -> None:
        self.factor = 1 if tree == REPOSITORY else 2

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, steps: int) -> dict[str, float]:
        self.turns.append("ours" if self.factor == 1 else "other")
        return {"seconds": float(self.factor * steps), "loss": 0.5}


def test_trees_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(against, "Worker", Timed)
    monkeypatch.setattr(Timed, "turns", [])
    training = Train(DICO, DIGITS, Recipe(steps=5, batch=16))
    values = compare(training, tmp_path, Rounds(4, 3))
    assert Timed.turns == ["other", "ours", "ours", "other"] * 2
    assert (values["ratio"], values["spread"]) == (2, 0)
    assert (values["samples_per_core_s"], values["against_samples_per_core_s"]) == (16, 8)


def test_a_comparison_is_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from experiments.declared.protocols import DIGITS as PROTOCOL

    monkeypatch.setattr(against, "Worker", Timed)
    monkeypatch.setattr(against, "find_commit", lambda tree: "abc")
    store = Store(tmp_path)
    measure_small([Row("row", DICO, {}, None)], PROTOCOL, tmp_path, Rounds(3, 1), store)
    (record,) = store.here.all()
    assert (record.kind, record.spec["against"]) == ("smalltrainings", "abc")
    assert record.values["geometric_mean"] == record.values["rows"]["row"]["ratio"] == 2
    assert record.provenance["precision_flags"].keys() == {"matmul_tf32", "cudnn_tf32"}


def test_a_tree_needs_a_commit_and_no_changes(tmp_path: Path):
    with pytest.raises(ValueError, match="is no checkout of this suite"):
        find_commit(tmp_path)
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    assert len(find_commit(tmp_path)) == 40
    (tmp_path / "a").write_text("2")
    with pytest.raises(ValueError, match="differs from its commit"):
        find_commit(tmp_path)
