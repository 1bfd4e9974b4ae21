"""`sample.py` refuses in one line what it cannot draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import sample
from tests.support.score_scripts import Script


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(sample, capsys, monkeypatch)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--row", "nothing"], "has no row 'nothing'"),
        (["--row", "DiCo-S", "--num", "0"], "from 1 on"),
        (["--row", "DiCo-S"], "no finished checkpoint"),
    ],
)
def test_sampling_refuses_what_it_cannot_draw(
    arguments: list[str], complaint: str, script: Script, tmp_path: Path
):
    assert complaint in script.refuse("--table", 4, "--results", tmp_path, *arguments)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("DiCo-S", "no finished checkpoint"),
        (
            "ADM-U",
            "row 'ADM-U' is not the same in all of tables 1, 2, 8, 9; say which with --table",
        ),
        ("DiCo-X", "no table has a network as row 'DiCo-X'"),
        ("LlamaGen-3B", "no table has a network as row 'LlamaGen-3B'"),
    ],
)
def test_a_row_finds_its_table(row: str, complaint: str, script: Script, tmp_path: Path):
    """A row that several tables declare alike is one run, whichever of them is named."""
    arguments = ("--row", row, "--protocol", "digits", "--results", tmp_path)
    assert complaint in script.refuse(*arguments)
