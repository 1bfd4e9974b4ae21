"""Sheets as text for people and terminals, and the choice of a format. No torch."""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experiments.engine.reporting.markup import csv_table, html_table, latex_table, markdown_table
from experiments.engine.reporting.sheet import Column, Kind, Sheet, Tone

NOTE_WIDTH = 120
# the width in characters below which a prose column is not wrapped
NARROWEST_PROSE = 24
GROUP_SEPARATOR = " | "
COLUMN_SEPARATOR = "  "
STYLES = {Tone.GOOD: "green", Tone.BAD: "red"}


def render(sheets: Sequence[Sheet], form: str) -> str:
    """All sheets in one of FORMATS, without columns that are all gaps.

    Text for a terminal is coloured, and split by groups of columns if it is wider than that.
    """
    printed = [sheet.without_empty_columns() for sheet in sheets]
    if form == "text" and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        return "\n".join(_coloured(_lines(sheet, width)) for sheet in printed)
    return "\n".join(FORMATS[form](sheet) for sheet in printed)


def text_table(sheet: Sheet, width: int | None = None) -> str:
    """A sheet in aligned columns.

    Args:
        sheet: the table.
        width: the characters of a line; None for as many as the table needs.
    """
    return "\n".join(line.text.rstrip() for line in _lines(sheet, width))


FORMATS: dict[str, Callable[[Sheet], str]] = {
    "text": text_table,
    "markdown": markdown_table,
    "latex": latex_table,
    "csv": csv_table,
    "html": html_table,
}


@dataclass
class Line:
    """A line of text, and the styles of parts of it."""

    text: str
    style: str = ""
    # (start, end, style) of parts
    parts: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass
class Printed:
    """A column as it is printed: the column and its texts, of which the first is the title."""

    column: Column
    texts: list[str]
    tones: list[Tone]
    width: int

    def piece(self, at: int, part: str) -> str:
        """One line of a text, padded."""
        return part.ljust(self.width) if self.column.kind is Kind.PROSE else part.rjust(self.width)

    def wrapped(self, at: int) -> list[str]:
        """The lines of a text in the column's width."""
        text = self.texts[at]
        if len(text) <= self.width:
            return [text]
        return textwrap.wrap(text, self.width) or [""]


def _lines(sheet: Sheet, width: int | None) -> list[Line]:
    """The title, the table in one block of lines or several, and the notes."""
    columns = [_printed(sheet, column) for column in sheet.columns]
    _widen(columns)
    lines = [Line(sheet.title, style="bold")]
    for block in _blocks(columns, width):
        lines += [Line(""), *_block_lines(block, len(sheet.rows))]

    # notes are wrapped even if the table is not
    lines.append(Line(""))
    for note in sheet.notes:
        wrapped = textwrap.wrap(
            note.text, min(width or NOTE_WIDTH, NOTE_WIDTH), subsequent_indent="  "
        )
        lines += [Line(text) for text in wrapped]
    return [*lines, Line("")]


def _printed(sheet: Sheet, column: Column) -> Printed:
    cells = sheet.values(column.key)
    texts = [column.title, *(cell.text(column.digits) for cell in cells)]
    tones = [Tone.PLAIN, *(cell.tone for cell in cells)]
    return Printed(column, texts, tones, max(len(text) for text in texts))


def _widen(columns: Sequence[Printed]) -> None:
    """Let the columns of a group share the room that its heading needs."""
    for group in _groups(columns):
        lack = max(0, len(group[0].column.group) - _group_width(group))
        share, rest = divmod(lack, len(group))
        for printed in group:
            printed.width += share
        group[-1].width += rest


def _blocks(columns: list[Printed], width: int | None) -> list[list[Printed]]:
    """The columns in blocks that fit the width, each opened by the column that names the rows.

    A block ends between two groups of columns, or within a group that fits no block.
    """
    if width is None:
        return [columns]
    first = columns[0]
    blocks = [[first]]
    for group in _groups(columns[1:]):
        if len(blocks[-1]) > 1 and _width([*blocks[-1], *group]) > width:
            blocks.append([first])
        for column in group:
            if len(blocks[-1]) > 1 and _width([*blocks[-1], column]) > width:
                blocks.append([first])
            blocks[-1].append(column)

    # a prose column that is too wide by itself is wrapped in what room there is
    return [_narrowed(block, width) for block in blocks]


def _narrowed(block: list[Printed], width: int) -> list[Printed]:
    excess = _width(block) - width
    if excess <= 0:
        return block
    widest = max(block, key=lambda column: column.width)
    if widest.column.kind is not Kind.PROSE:
        return block
    narrow = max(widest.width - excess, NARROWEST_PROSE)
    return [
        Printed(column.column, column.texts, column.tones, narrow) if column is widest else column
        for column in block
    ]


def _groups(columns: Sequence[Printed]) -> list[list[Printed]]:
    """Runs of neighbouring columns of one group."""
    runs = itertools.groupby(columns, key=lambda printed: printed.column.group)
    return [list(run) for _, run in runs]


def _width(columns: Sequence[Printed]) -> int:
    groups = _groups(columns)
    return sum(_group_width(group) for group in groups) + len(GROUP_SEPARATOR) * (len(groups) - 1)


def _group_width(group: Sequence[Printed]) -> int:
    """The characters of the columns of a group."""
    return sum(printed.width for printed in group) + len(COLUMN_SEPARATOR) * (len(group) - 1)


def _block_lines(block: list[Printed], num_rows: int) -> list[Line]:
    """Headings, a rule and the rows of one block."""
    # a group that was split has its heading in both blocks
    _widen(block)
    groups = _groups(block)
    lines = []
    if any(printed.column.group for printed in block):
        heading = GROUP_SEPARATOR.join(
            group[0].column.group.center(_group_width(group)) for group in groups
        )
        lines.append(Line(heading))

    # a row has as many lines as its longest wrapped cell
    body = [line for at in range(num_rows + 1) for line in _row_lines(groups, at)]
    head = len(_row_lines(groups, 0))
    rule = Line("-" * max(len(line.text.rstrip()) for line in [*lines, *body]))
    return [*lines, *body[:head], rule, *body[head:]]


def _row_lines(groups: list[list[Printed]], at: int) -> list[Line]:
    height = max(len(printed.wrapped(at)) for group in groups for printed in group)
    lines = []
    for number in range(height):
        line = Line("")
        for group in groups:
            if group is not groups[0]:
                line.text += GROUP_SEPARATOR
            for printed in group:
                if printed is not group[0]:
                    line.text += COLUMN_SEPARATOR
                _append(line, printed, at, number)
        lines.append(line)
    return lines


def _append(line: Line, printed: Printed, at: int, number: int) -> None:
    """Append one line of a cell, with its style."""
    wrapped = printed.wrapped(at)
    text = printed.piece(at, wrapped[number] if number < len(wrapped) else "")
    style = STYLES.get(printed.tones[at])
    if style:
        line.parts.append((len(line.text), len(line.text) + len(text), style))
    line.text += text


def _coloured(lines: Sequence[Line]) -> str:
    """Lines with the escape sequences of a terminal."""
    from rich.console import Console
    from rich.text import Text

    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, width=10**4, soft_wrap=True)
    for number, line in enumerate(lines):
        text = Text(line.text, style=line.style)
        for start, end, style in line.parts:
            text.stylize(style, start, end)
        text.rstrip()
        console.print(text, end="" if number == len(lines) - 1 else "\n")
    return buffer.getvalue()
