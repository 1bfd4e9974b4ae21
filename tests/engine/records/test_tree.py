"""The code that runs is the tree whose command was called; a record names its commit or none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.records import tree
from tests.support.paths import ROOT

STRANGER = 'raise SystemExit("a stranger\'s package was imported")\n'


def git(folder: Path, *command: str) -> str:
    """What git prints in a folder, with an identity of its own."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """Make a repository with one tracked file, and return its commit."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q")
    (folder / "file").write_text("a")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    """Look at another folder as if it were this tree."""

    def look(folder: Path) -> tree.Commit:
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(tree, "REPOSITORY", folder.resolve())
        tree.tree_commit.cache_clear()
        return tree.tree_commit()

    monkeypatch.delenv("DICO_COMMIT", raising=False)
    yield look
    tree.tree_commit.cache_clear()


def test_an_own_repository_gives_its_commit(tmp_path: Path, at, monkeypatch: pytest.MonkeyPatch):
    own = repository(tmp_path / "own")
    # git's answer goes before the variable
    monkeypatch.setenv("DICO_COMMIT", "named")
    assert at(tmp_path / "own") == tree.Commit(own, dirty=False)

    (tmp_path / "own" / "file").write_text("b")
    assert at(tmp_path / "own") == tree.Commit(own, dirty=True)


def test_a_folder_with_odd_characters_is_a_repository_like_any_other(tmp_path: Path, at):
    folder = tmp_path / "a b\u00e9'%"
    assert at(folder).hash is None
    assert repository(folder) == at(folder).hash


@pytest.mark.parametrize("depth", ["vendor", "vendor/deeper"])
def test_another_repository_around_the_tree_is_not_its_own(tmp_path: Path, at, depth: str):
    repository(tmp_path)
    commit = at(tmp_path / depth)
    assert (commit.hash, commit.dirty) == (None, None)
    assert "within another repository" in commit.reason


@pytest.mark.parametrize(
    "name, value",
    [
        ("GIT_DIR", "other/.git"),
        ("GIT_WORK_TREE", "other"),
        ("GIT_INDEX_FILE", "other/.git/index"),
        ("GIT_CEILING_DIRECTORIES", ""),
        ("GIT_COMMON_DIR", "other/.git"),
    ],
)
def test_gits_own_variables_change_nothing(
    tmp_path: Path, at, monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    own, _ = repository(tmp_path / "own"), repository(tmp_path / "other")
    monkeypatch.setenv(name, str(tmp_path / value))
    assert at(tmp_path / "own") == tree.Commit(own, dirty=False)


def test_a_tree_without_history_takes_the_commit_that_it_is_told(
    tmp_path: Path, at, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert "git knows no repository" in at(tmp_path / "bare").reason
    tree.warn_without_commit.cache_clear()
    tree.warn_without_commit()
    tree.warn_without_commit()
    assert capsys.readouterr().err.count("records name no commit") == 1

    monkeypatch.setenv("DICO_COMMIT", "named")
    assert at(tmp_path / "bare") == tree.Commit("named", None)
    monkeypatch.setenv("DICO_COMMIT", "")
    assert at(tmp_path / "bare").hash is None


def test_a_repository_without_a_commit_says_so(tmp_path: Path, at):
    git(tmp_path, "init", "-q")
    assert "no commit yet" in at(tmp_path).reason


def test_a_worker_of_another_tree_is_refused():
    tree.require_tree(tree.tree_digest())
    with pytest.raises(ValueError, match="imports other code"):
        tree.require_tree("0" * 16)


def test_the_own_tree_comes_first_on_the_path(tmp_path: Path):
    entries = ["", str(tmp_path), str(tree.REPOSITORY), "relative"]
    environment = tree.own_environment({"PYTHONPATH": os.pathsep.join(entries), "HOME": "/"})
    expected = [str(tree.REPOSITORY), str(tmp_path), "relative"]
    assert environment["PYTHONPATH"].split(os.pathsep) == expected
    assert environment["HOME"] == "/"


@pytest.fixture(scope="module")
def wider_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree whose dico_s is wider."""
    copy = tmp_path_factory.mktemp("wider")
    for package in tree.PACKAGES:
        shutil.copytree(ROOT / package, copy / package)
    file = copy / "backbones" / "dico.py"
    assert "dim=128" in file.read_text()
    file.write_text(file.read_text().replace("dim=128", "dim=160", 1))
    return copy


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of our names that are somebody else's."""
    folder = tmp_path_factory.mktemp("strangers")
    for package in tree.PACKAGES:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(STRANGER)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "cluster, offered, way",
    [
        ("here", "another tree", "folder"),
        ("here", "another tree", "path"),
        ("here", "strangers", "both"),
        ("local", "strangers", "folder"),
        ("local", "another tree", "both"),
        ("debug", "strangers", "path"),
    ],
)
def test_workers_run_the_commands_own_tree(
    wider_tree: Path, strangers: Path, tmp_path: Path, cluster: str, offered: str, way: str
):
    other = wider_tree if offered == "another tree" else strangers
    python_path = "" if way == "folder" else str(other)
    environment = os.environ | {"PYTHONPATH": python_path}
    script = ROOT / "experiments" / "ablation.py"
    options = ["--table", "5", "--rows", "DiCo-S", "--cluster", cluster]
    done = subprocess.run(
        [sys.executable, script, *options, "--results", tmp_path / "results"],
        cwd=tmp_path if way == "path" else other,
        env=environment,
        capture_output=True,
        text=True,
    )

    # The count is that of this tree's network.
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results" / "records" / "cost").glob("*.json")
    assert json.loads(record.read_text())["values"]["params_total"] == 33_137_672
