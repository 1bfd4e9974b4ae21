"""Every format says what a sheet holds, and says it so that people can read it."""

from __future__ import annotations

import csv
import io
import math
import os
import sys

import pytest

from experiments.engine.reporting import render as rendering
from experiments.engine.reporting.render import FORMATS, render, text_table
from experiments.engine.reporting.sheet import (
    FAILED,
    Cell,
    Column,
    Kind,
    Note,
    NoteKind,
    Sheet,
    Tone,
    Topic,
)

ROW = Column("row", "row", kind=Kind.PROSE)
HARD = Sheet(
    "50% & more_of it",
    [ROW, Column("x", "x", "a_b & c"), Column("y", "y#", "a_b & c")],
    [{"row": Cell(label="A->B & 5%"), "x": Cell(1.5, 0.25), "y": FAILED}],
    [Note(NoteKind.GENERAL, "100% sure_thing")],
)


@pytest.mark.parametrize(
    "cell, text",
    [
        (Cell(), "-"),
        (Cell(math.nan), "-"),
        (Cell(1.234, 0.056), "1.23 ±0.06"),
        (Cell(1.234, math.nan, 1), "1.2"),
        (Cell(0.0), "0.00"),
        (Cell(-0.001), "0.00"),
        (Cell(-0.01), "-0.01"),
        (Cell(3.0, label="failed"), "failed"),
    ],
)
def test_what_a_cell_says(cell: Cell, text: str):
    assert cell.text() == text


def test_a_cell_without_digits_of_its_own_has_its_columns():
    sheet = Sheet(
        "t", [ROW, Column("x", "x", digits=1)], [{"x": Cell(1.25)}, {"x": Cell(1.25, None, 3)}]
    )
    assert "1.2\n" in render([sheet], "text") and "1.250\n" in render([sheet], "text")


@pytest.mark.parametrize("form", FORMATS)
def test_a_column_that_is_all_gaps_is_not_printed(form: str):
    columns = [ROW, Column("full", "full"), Column("empty", "empty"), Column("part", "part")]
    rows = [
        {"row": Cell(label="a"), "full": Cell(1.0), "empty": Cell(math.nan), "part": Cell(2.0)},
        {"row": Cell(label="b"), "full": Cell(1.0)},
    ]
    text = render([Sheet("t", columns, rows)], form)
    assert "full" in text and "part" in text and "empty" not in text


def test_a_sheet_finds_its_columns_by_key_and_names_the_known_ones():
    sheet = Sheet("t", [ROW], [{"row": Cell(label="a")}])
    sheet.add_column(Column("x", "x"), [Cell(1.0)])
    sheet.add_column(Column("y", "y"), [Cell(2.0)], after="row")
    assert [column.key for column in sheet.columns] == ["row", "y", "x"]
    assert [cell.value for cell in sheet.values("y")] == [2.0]
    with pytest.raises(KeyError, match="no column 'z'.*known: 'row', 'y', 'x'"):
        sheet.values("z")
    with pytest.raises(KeyError, match="no column 'typo'"):
        sheet.add_row({"typo": Cell()})


def test_a_topic_has_its_columns_its_notes_and_the_names_of_the_rows():
    columns = [
        ROW,
        Column("gflops", "Gflops", topic=Topic.COUNTS),
        Column("fid", "FID", topic=Topic.SCORES),
    ]
    notes = [Note(NoteKind.COUNTS, "c"), Note(NoteKind.SCORES, "s"), Note(NoteKind.RECORDS, "r")]
    sheet = Sheet("t", columns, [], notes)
    part = sheet.about(Topic.SCORES)
    assert sheet.topics() == [Topic.COUNTS, Topic.SCORES]
    assert [column.key for column in part.columns] == ["row", "fid"]
    assert [note.text for note in part.notes] == ["s", "r"]


def test_csv_keeps_every_digit_and_every_error():
    sheet = Sheet(
        "t",
        [ROW, Column("x", "x", "g"), Column("y", "y")],
        [
            {"row": Cell(label="a"), "x": Cell(1 / 3, 2 / 3), "y": Cell(1e-7)},
            {"row": Cell(label="b"), "x": FAILED},
        ],
    )
    names, first, second = csv.reader(io.StringIO(render([sheet], "csv")))
    assert names == ["row", "g: x", "g: x error", "y"]
    assert [float(text) for text in first[1:]] == [1 / 3, 2 / 3, 1e-7]
    assert second == ["b", "failed", "", ""]


def test_latex_holds_no_bare_special_characters():
    text = render([HARD], "latex")
    bare = "".join(line for line in text.splitlines() if not line.startswith("%"))
    assert "100\\% sure\\_thing" in bare
    for escaped in ("\\\\", "\\&", "\\%", "\\_", "\\#", "$\\pm$", "$\\to$"):
        bare = bare.replace(escaped, "")
    assert not set("%_#$^~") & set(bare)
    assert bare.count("{") == bare.count("}") and bare.count("&") == 1 + 2 + 2
    begin, rule, end = (text.index(word) for word in ("{tabular}{lrr}", "\\midrule", "\\end{tab"))
    assert begin < rule < end


def test_markdown_aligns_prose_to_the_left_and_ends_with_the_notes():
    lines = render([HARD], "markdown").splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {4}
    assert "|---|---:|---:|" in lines and "- 100% sure_thing" in lines


def test_html_escapes_and_keeps_full_precision():
    sheet = Sheet(
        "a < b",
        [ROW, Column("x", "x", "g & h")],
        [{"row": Cell(label="<script>"), "x": Cell(1 / 3)}, {"row": Cell(label="gap")}],
        [Note(NoteKind.GENERAL, "n > m")],
    )
    text = render([sheet], "html")
    assert "<script>" not in text and "&lt;script&gt;" in text and "g &amp; h" in text
    assert f'data-order="{1 / 3!r}"' in text and 'data-order=""' in text
    assert '<th class="prose">row</th>' in text and "<th>x</th>" in text


def test_text_lines_up_and_names_every_column():
    title, _, groups, names, rule, row, *_ = render([HARD], "text").splitlines()
    assert title == HARD.title and names.split() == ["row", "|", "x", "y#"]
    assert names.index("|") == groups.index("|") == row.index("|")
    assert set(rule) == {"-"} and len(rule) >= len(row)


WIDE = Sheet(
    "wide",
    [
        ROW,
        *(
            Column(f"{group}{at}", f"column {at}", f"group {group}")
            for group in "abc"
            for at in (1, 2)
        ),
    ],
    [{"row": Cell(label="a row"), "a1": Cell(1.0), "b2": Cell(2.0), "c1": Cell(3.0)}],
)


def test_a_narrow_terminal_gets_the_groups_below_each_other():
    lines = text_table(WIDE, 50).splitlines()
    assert max(map(len, lines)) <= 50
    headings = [line for line in lines if "group" in line]
    assert [line.split() for line in headings][1] == ["|", "group", "c"]
    assert sum(line.startswith("a row") for line in lines) == len(headings) == 2
    assert len([line for line in text_table(WIDE).splitlines() if "group" in line]) == 1


def test_prose_that_no_terminal_holds_is_wrapped_within_its_column():
    columns = [ROW, Column("basis", "basis", kind=Kind.PROSE)]
    basis = " ".join(f"word{number}" for number in range(30))
    sheet = Sheet("claims", columns, [{"row": Cell(label="a"), "basis": Cell(label=basis)}])
    lines = text_table(sheet, 60).splitlines()
    assert max(map(len, lines)) <= 60 and basis in text_table(sheet)
    start = next(line for line in lines if line.startswith("a")).index("word0")
    wrapped = [line[start:].strip() for line in lines if "word" in line]
    assert len(wrapped) > 3 and " ".join(wrapped) == basis


def test_a_terminal_shows_failures_in_red_and_agreement_in_green(monkeypatch: pytest.MonkeyPatch):
    good = Cell(label="yes", tone=Tone.GOOD)
    sheet = Sheet(
        "t", [ROW, Column("x", "x")], [{"row": Cell(label="a"), "x": FAILED}, {"x": good}]
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    size = os.terminal_size((80, 24))
    monkeypatch.setattr(rendering.shutil, "get_terminal_size", lambda *_, **__: size)
    text = render([sheet], "text")
    assert "\x1b[31mfailed\x1b[0m" in text and "\x1b[32m   yes\x1b[0m" in text
