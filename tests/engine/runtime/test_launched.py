"""Ranks that torchrun starts import the tree of their script, and all the same tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = """
import os
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbones
from experiments.engine.runtime.group import join_group
try:
    group = join_group("cpu", 60.0)
    line = f"imported {group.rank} {Path(backbones.__file__).parents[1]}"
except ValueError as error:
    line = f"refused {error}"
# The ranks share one pipe: a line that is written at once is never mixed with another rank's.
os.write(1, f"{line}\\n".encode())
"""
# Every rank runs the script of the tree that the environment names for it.
BY_RANK = """
import os, runpy
runpy.run_path(os.environ["TREE_" + os.environ["RANK"]] + "/experiments/which.py")
"""
STRANGER = 'raise SystemExit("the package of a stranger was imported")\n'


def copy_tree(folder: Path) -> Path:
    """Copy the packages into a folder, with a script beside the others."""
    for name in ("backbones", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "experiments" / "which.py").write_text(SCRIPT)
    return folder


def launch(script: Path, cwd: Path, **variables: str) -> list[str]:
    """Start two ranks with torchrun, and return what they say, sorted."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    # The launcher itself stands in the stranger's folder and must not import from there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder that offers packages of this suite's names."""
    for name in ("backbones", "experiments"):
        (tmp_path / "stranger" / name).mkdir(parents=True)
        (tmp_path / "stranger" / name / "__init__.py").write_text(STRANGER)
    return tmp_path / "stranger"


@pytest.mark.slow
@pytest.mark.parametrize("offered", ["current folder", "PYTHONPATH"])
def test_ranks_import_the_tree_of_their_script(offered: str, stranger: Path, tmp_path: Path):
    tree = copy_tree(tmp_path / "tree")
    variables = {"PYTHONPATH": str(stranger)} if offered == "PYTHONPATH" else {}
    lines = launch(tree / "experiments" / "which.py", stranger, **variables)
    assert lines == [f"imported {rank} {tree}" for rank in range(2)]


@pytest.mark.slow
def test_ranks_of_two_trees_refuse_each_other(stranger: Path, tmp_path: Path):
    trees = [copy_tree(tmp_path / "first"), copy_tree(tmp_path / "second")]
    script = tmp_path / "by_rank.py"
    script.write_text(BY_RANK)
    variables = {f"TREE_{rank}": str(tree) for rank, tree in enumerate(trees)}

    # Equal copies may work together.
    expected = [f"imported {rank} {tree}" for rank, tree in enumerate(trees)]
    assert launch(script, stranger, **variables) == expected

    with (trees[1] / "backbones" / "dico.py").open("a") as file:
        file.write("# edited\n")
    other, own = launch(script, stranger, **variables)
    assert other.startswith("refused another rank imports other code than this one; start")
    assert own.startswith(f"refused this worker imports other code, from {trees[1]}, than")
