"""Sheets as rich or plain text, Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
import shutil
import sys
import textwrap

from experiments.engine.reporting.sheet import Cell, Sheet, upgraded

FORMATS = ("text", "markdown", "latex", "csv", "html")
LATEX = {
    "->": "$\\to$",
    "±": "$\\pm$",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
} | {sign: f"\\{sign}" for sign in "&%_#${}"}


def render(sheets: list[Sheet], form: str) -> str:
    """All sheets in one of FORMATS; text for a terminal is fitted to its width and coloured."""
    sheets = [_positional(upgraded(sheet)) for sheet in sheets]
    if form == "text" and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        return "\n".join(_coloured(_text(sheet, width)) for sheet in sheets)
    return "\n".join(
        {"text": _text, "markdown": _markdown, "latex": _latex, "csv": _csv, "html": _html}[form](
            sheet
        )
        for sheet in sheets
    )


def _positional(sheet: Sheet) -> Sheet:
    """TRANSITION, to go: a sheet of the new types as the renderers below read it."""
    columns = [(column.group, column.title) for column in sheet.columns]
    rows = [[cell for _, cell in sheet.cells(row)] for row in sheet.rows]
    return Sheet(sheet.title, columns, rows, [note.text for note in sheet.notes])


def _text(sheet: Sheet, width: int = 10**6) -> str:
    """Aligned columns; groups that do not fit the width go into further blocks, each headed by the rows' names."""
    texts = [
        [name for _, name in sheet.columns],
        *([cell.text() for cell in row] for row in sheet.rows),
    ]
    widths = [max(len(row[i]) for row in texts) for i in range(len(sheet.columns))]
    groups, start = [], 0
    for group, length in _groups(sheet):  # a group's columns share the room that its heading needs
        lack = max(0, len(group) - sum(widths[start : start + length]) - 2 * (length - 1))
        for i in range(length):
            widths[start + i] += lack // length + (i < lack % length)
        groups.append(
            (
                group,
                range(start, start + length),
                sum(widths[start : start + length]) + 2 * (length - 1),
            )
        )
        start += length
    blocks, used = [[groups[0]]], groups[0][2]
    for group in groups[1:]:
        if used + 3 + group[2] > width and len(blocks[-1]) > 1:
            blocks.append([groups[0]])
            used = groups[0][2]
        blocks[-1].append(group)
        used += 3 + group[2]
    lines = [sheet.title]
    for block in blocks:
        body = [
            " | ".join(
                "  ".join(_padded(row[i], widths[i], i) for i in columns) for _, columns, _ in block
            ).rstrip()
            for row in texts
        ]
        heading = " | ".join(group.center(size) for group, _, size in block).rstrip()
        lines += ["", heading, body[0], "-" * max(map(len, body)), *body[1:]]
    notes = [textwrap.fill(note, min(width, 140), subsequent_indent="  ") for note in sheet.notes]
    return "\n".join([*lines, "", *notes, ""])


def _padded(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column else text.ljust(width)


def _coloured(text: str) -> str:
    from rich.console import Console
    from rich.text import Text

    title, _, rest = text.partition("\n")
    styled = Text.assemble((title, "bold"), "\n", rest)
    styled.highlight_words(["failed"], "red")
    styled.highlight_words([" yes"], "green")
    buffer = io.StringIO()
    Console(file=buffer, force_terminal=True, width=10**4, soft_wrap=True).print(styled, end="")
    return buffer.getvalue()


def _groups(sheet: Sheet) -> list[tuple[str, int]]:
    """Runs of neighbouring columns of one group, with their lengths."""
    return [
        (group, len(list(run)))
        for group, run in itertools.groupby(group for group, _ in sheet.columns)
    ]


def _markdown(sheet: Sheet) -> str:
    names = [f"{group}: {name}" if group else name for group, name in sheet.columns]
    lines = [
        f"**{sheet.title}**",
        "",
        "| " + " | ".join(names) + " |",
        "|---|" + "---:|" * (len(names) - 1),
    ]
    lines += [
        "| " + " | ".join(f"**{cell.text()}**" if cell.best else cell.text() for cell in row) + " |"
        for row in sheet.rows
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in sheet.notes), ""])


def _latex(sheet: Sheet) -> str:
    def escape(text: str) -> str:
        return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)

    groups = " & ".join(
        f"\\multicolumn{{{length}}}{{c}}{{{escape(group)}}}" for group, length in _groups(sheet)
    )
    lines = [
        "% " + sheet.title,
        "\\begin{tabular}{l" + "r" * (len(sheet.columns) - 1) + "}",
        "\\toprule",
        groups + " \\\\",
    ]
    lines += [" & ".join(escape(name) for _, name in sheet.columns) + " \\\\", "\\midrule"]
    lines += [
        " & ".join(
            f"\\textbf{{{escape(cell.text())}}}" if cell.best else escape(cell.text())
            for cell in row
        )
        + " \\\\"
        for row in sheet.rows
    ]
    return "\n".join(
        [
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            *(f"\\par{{\\footnotesize {escape(note)}\\par}}" for note in sheet.notes),
            "",
        ]
    )


def _csv(sheet: Sheet) -> str:
    """Full precision; a column with errors is followed by one that holds them. The last column holds the notes, all in the first row."""
    with_error = [
        any(row[i].error is not None for row in sheet.rows) for i in range(len(sheet.columns))
    ]
    names = [f"{group}: {name}" if group else name for group, name in sheet.columns]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *(
                part
                for name, error in zip(names, with_error, strict=True)
                for part in ([name, f"{name} error"] if error else [name])
            ),
            "notes",
        ]
    )
    for i, row in enumerate(sheet.rows or [[Cell()] * len(names)] * bool(sheet.notes)):
        writer.writerow(
            [
                *(
                    part
                    for cell, error in zip(row, with_error, strict=True)
                    for part in _raw(cell, error)
                ),
                "" if i else "\n".join(sheet.notes),
            ]
        )
    return buffer.getvalue()


def _raw(cell: Cell, error: bool) -> list[str]:
    value = cell.label or ("" if cell.value is None else repr(cell.value))
    return [value, "" if cell.error is None else repr(cell.error)] if error else [value]


def _html(sheet: Sheet) -> str:
    """A table with two heading rows. A cell carries its value in full precision to sort by and the names of its records."""
    groups = "".join(
        f'<th colspan="{length}">{html.escape(group)}</th>' for group, length in _groups(sheet)
    )
    names = "".join(f"<th>{html.escape(name)}</th>" for _, name in sheet.columns)
    lines = [
        "<figure>",
        f"<figcaption>{html.escape(sheet.title)}</figcaption>",
        "<table>",
        f"<thead><tr>{groups}</tr><tr>{names}</tr></thead>",
        "<tbody>",
    ]
    lines += ["<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in sheet.rows]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in sheet.notes)
    return "\n".join([*lines, "</tbody>", "</table>", f"<ul>{notes}</ul>", "</figure>", ""])


def _html_cell(cell: Cell) -> str:
    attributes = (
        ""
        if cell.label and cell.value is None
        else f' data-order="{"" if cell.value is None else repr(cell.value)}"'
    )
    if cell.records:
        attributes += f' data-records="{" ".join(record.name for record in cell.records)}"'
    text = html.escape(cell.text())
    return f"<td{attributes}>{f'<b>{text}</b>' if cell.best else text}</td>"
