"""Sheets as Markdown, LaTeX, CSV and HTML. Standard library only."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re

from experiments.engine.reporting.sheet import Cell, Column, Kind, Sheet, SheetRow

LATEX = {
    "->": "$\\to$",
    "±": "$\\pm$",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
} | {sign: f"\\{sign}" for sign in "&%_#${}"}


def grouped(sheet: Sheet) -> list[tuple[str, int]]:
    """The runs of neighbouring columns of one group, with their lengths."""
    runs = itertools.groupby(column.group for column in sheet.columns)
    return [(group, len(list(run))) for group, run in runs]


def markdown_table(sheet: Sheet) -> str:
    """A title, a table with one heading row, and a list of notes."""
    notes = [f"- {note.text}" for note in sheet.notes]
    return "\n".join([f"**{sheet.title}**", "", *markdown_rows(sheet), "", *notes, ""])


def markdown_rows(sheet: Sheet) -> list[str]:
    """The lines of a table alone."""
    rules = ["---" if column.kind is Kind.PROSE else "---:" for column in sheet.columns]
    lines = [_markdown_row([column.full_title for column in sheet.columns])]
    lines.append(f"|{'|'.join(rules)}|")
    for row in sheet.rows:
        lines.append(
            _markdown_row([_markdown_cell(column, cell) for column, cell in sheet.cells(row)])
        )
    return lines


def _markdown_row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _markdown_cell(column: Column, cell: Cell) -> str:
    text = cell.text(column.digits)
    return f"**{text}**" if cell.best else text


def latex_table(sheet: Sheet) -> str:
    """A tabular with booktabs rules, and the notes below it."""
    alignment = "".join("l" if column.kind is Kind.PROSE else "r" for column in sheet.columns)
    groups = [
        f"\\multicolumn{{{length}}}{{c}}{{{_latex(group)}}}" for group, length in grouped(sheet)
    ]
    titles = [_latex(column.title) for column in sheet.columns]

    # Two rows of headings stand above the rows of numbers.
    lines = [
        f"% {sheet.title}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        _latex_row(groups),
        _latex_row(titles),
        "\\midrule",
    ]
    for row in sheet.rows:
        lines.append(_latex_row([_latex_cell(column, cell) for column, cell in sheet.cells(row)]))

    notes = [f"\\par{{\\footnotesize {_latex(note.text)}\\par}}" for note in sheet.notes]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *notes, ""])


def _latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def _latex_row(texts: list[str]) -> str:
    return " & ".join(texts) + " \\\\"


def _latex_cell(column: Column, cell: Cell) -> str:
    text = _latex(cell.text(column.digits))
    return f"\\textbf{{{text}}}" if cell.best else text


def csv_table(sheet: Sheet) -> str:
    """Numbers in full precision; a column of errors follows a column that has some."""
    with_error = {
        column.key
        for column in sheet.columns
        if any(cell.error is not None for cell in sheet.values(column.key))
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")

    titles = []
    for column in sheet.columns:
        titles.append(column.full_title)
        if column.key in with_error:
            titles.append(f"{column.full_title} error")
    writer.writerow(titles)

    for row in sheet.rows:
        writer.writerow(_csv_row(sheet, row, with_error))
    return buffer.getvalue()


def _csv_row(sheet: Sheet, row: SheetRow, with_error: set[str]) -> list[str]:
    texts = []
    for column, cell in sheet.cells(row):
        texts.append(cell.label or ("" if cell.value is None else repr(cell.value)))
        if column.key in with_error:
            texts.append("" if cell.error is None else repr(cell.error))
    return texts


def html_table(sheet: Sheet) -> str:
    """A figure with the title, a table with two heading rows, and a list of notes.

    A cell carries its value in full precision to sort by, and the names of its records.
    """
    groups = "".join(
        f'<th colspan="{length}">{html.escape(group)}</th>' for group, length in grouped(sheet)
    )
    titles = "".join(
        f"<th{_html_class(column)}>{html.escape(column.title)}</th>" for column in sheet.columns
    )

    # The groups of columns head the table, and the titles stand below them.
    lines = [
        "<figure>",
        f"<figcaption>{html.escape(sheet.title)}</figcaption>",
        "<table>",
        f"<thead><tr>{groups}</tr><tr>{titles}</tr></thead>",
        "<tbody>",
    ]
    for row in sheet.rows:
        cells = "".join(_html_cell(column, cell) for column, cell in sheet.cells(row))
        lines.append(f"<tr>{cells}</tr>")

    notes = "".join(f"<li>{html.escape(note.text)}</li>" for note in sheet.notes)
    return "\n".join([*lines, "</tbody>", "</table>", f"<ul>{notes}</ul>", "</figure>", ""])


def _html_class(column: Column) -> str:
    return ' class="prose"' if column.kind is Kind.PROSE else ""


def _html_cell(column: Column, cell: Cell) -> str:
    attributes = _html_class(column)
    if cell.value is not None or not cell.label:
        order = "" if cell.value is None else repr(cell.value)
        attributes += f' data-order="{order}"'
    if cell.records:
        names = " ".join(record.name for record in cell.records)
        attributes += f' data-records="{names}"'

    text = html.escape(cell.text(column.digits))
    return f"<td{attributes}>{f'<b>{text}</b>' if cell.best else text}</td>"
