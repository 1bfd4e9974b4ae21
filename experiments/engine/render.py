"""Sheets as rich or plain text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import sys
import textwrap

from experiments.engine.report import Cell, Sheet

FORMATS = ("text", "markdown", "latex", "csv")


def render(sheets: list[Sheet], form: str) -> str:
    """All sheets in one of FORMATS; text is coloured by rich where it goes to a terminal."""
    if form == "text":
        return "\n".join(_rich(sheet) if sys.stdout.isatty() else _plain(sheet) for sheet in sheets)
    return "\n".join({"markdown": _markdown, "latex": _latex, "csv": _csv}[form](sheet) for sheet in sheets)


def _groups(sheet: Sheet) -> list[tuple[str, int]]:
    """Runs of neighbouring columns of one group, with their lengths."""
    runs: list[tuple[str, int]] = []
    for group, _ in sheet.columns:
        runs = [*runs[:-1], (group, runs[-1][1] + 1)] if runs and runs[-1][0] == group else [*runs, (group, 1)]
    return runs


def _plain(sheet: Sheet) -> str:
    texts = [[cell.text() for cell in row] for row in sheet.rows]
    widths = [max(len(name), *(len(row[i]) for row in texts), 0) for i, (_, name) in enumerate(sheet.columns)]
    start = 0
    for group, length in _groups(sheet):  # a group's columns share the room that its heading needs
        lack = max(0, len(group) - sum(widths[start : start + length]) - 2 * (length - 1))
        for i in range(length):
            widths[start + i] += lack // length + (i < lack % length)
        start += length
    lines, heading, start = [sheet.title, ""], [], 0
    for group, length in _groups(sheet):
        heading.append(group.center(sum(widths[start : start + length]) + 2 * (length - 1)))
        start += length
    lines.append(" | ".join(heading).rstrip())
    for row in [[name for _, name in sheet.columns], *texts]:
        padded, parts, start = [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))], [], 0
        for _, length in _groups(sheet):
            parts.append("  ".join(padded[start : start + length]))
            start += length
        lines.append(" | ".join(parts).rstrip())
    lines.insert(4, "-" * max(map(len, lines[2:])))
    return "\n".join([*lines, "", *(textwrap.fill(note, 140, subsequent_indent="  ") for note in sheet.notes), ""])


def _rich(sheet: Sheet) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(title=sheet.title, title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    seen = ""
    for i, (group, name) in enumerate(sheet.columns):
        table.add_column(f"{group if group != seen else ''}\n{name}", justify="left" if i == 0 else "right", no_wrap=i > 0)
        seen = group
    for row in sheet.rows:
        table.add_row(*(f"[red]{cell.text()}[/red]" if cell.words == "failed" else cell.text() for cell in row))
    buffer = io.StringIO()
    measured = Console(width=1000).measure(table).maximum
    Console(file=buffer, force_terminal=True, width=max(measured, 80)).print(table)
    return buffer.getvalue() + "\n".join([*(textwrap.fill(note, 120, subsequent_indent="  ") for note in sheet.notes), ""])


def _markdown(sheet: Sheet) -> str:
    names = [f"{group}: {name}" if group else name for group, name in sheet.columns]
    lines = [f"**{sheet.title}**", "", "| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    lines += ["| " + " | ".join(cell.text() for cell in row) + " |" for row in sheet.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in sheet.notes), ""])


def _latex(sheet: Sheet) -> str:
    def escape(text: str) -> str:
        for raw, safe in (("\\", "\\textbackslash{}"), ("&", "\\&"), ("%", "\\%"), ("_", "\\_"), ("#", "\\#"), ("->", "$\\to$"), ("±", "$\\pm$")):
            text = text.replace(raw, safe)
        return text

    groups = " & ".join(f"\\multicolumn{{{length}}}{{c}}{{{escape(group)}}}" for group, length in _groups(sheet))
    lines = ["% " + sheet.title, "\\begin{tabular}{l" + "r" * (len(sheet.columns) - 1) + "}", "\\toprule", groups + " \\\\"]
    lines += [" & ".join(escape(name) for _, name in sheet.columns) + " \\\\", "\\midrule"]
    lines += [" & ".join(escape(cell.text()) for cell in row) + " \\\\" for row in sheet.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *("% " + note for note in sheet.notes), ""])


def _csv(sheet: Sheet) -> str:
    """Full precision; a column with errors is followed by one that holds them."""
    with_error = [any(row[i].error is not None for row in sheet.rows) for i in range(len(sheet.columns))]
    names = [f"{group}: {name}" if group else name for group, name in sheet.columns]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([part for name, error in zip(names, with_error, strict=True) for part in ([name, f"{name} error"] if error else [name])])
    for row in sheet.rows:
        writer.writerow([part for cell, error in zip(row, with_error, strict=True) for part in _raw(cell, error)])
    return buffer.getvalue()


def _raw(cell: Cell, error: bool) -> list[str]:
    value = cell.words or ("" if cell.value is None else repr(cell.value))
    return [value, "" if cell.error is None else repr(cell.error)] if error else [value]
