"""Notebooks run from top to bottom, hold no outputs in git and no logic of their own."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from backbones import registry
from experiments.engine.records.tree import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "analysis" / "notebooks").glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.While, ast.If, ast.Try)


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"tables", "figures", "add_a_backbone"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path):
    cells = code_cells(path)
    assert cells
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_logic(path: Path):
    """Calls, a class that is explained and a loop over figures are all that a notebook may hold."""
    for cell in code_cells(path):
        tree = ast.parse("".join(cell["source"]))
        assert not [node for node in tree.body if isinstance(node, LOGIC)], cell["id"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_line_of_a_notebook_is_too_long(path: Path):
    for cell in code_cells(path):
        for line in "".join(cell["source"]).splitlines():
            assert len(line) <= 100, line


def test_the_code_of_the_notebook_on_backbones_runs(monkeypatch: pytest.MonkeyPatch):
    """The cells run in this process, which saves the start of a kernel; a slow test runs all."""
    monkeypatch.chdir(REPOSITORY / "analysis" / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    # A backbone that a notebook registers must not be seen by other tests.
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    (path,) = [path for path in NOTEBOOKS if path.stem == "add_a_backbone"]
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in code_cells(path):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_in_a_kernel(path: Path, monkeypatch: pytest.MonkeyPatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert bool(images) == (path.stem == "figures")
