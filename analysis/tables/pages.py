"""Pages of text and tables made from numbers, as blocks that know the records behind them, and their Markdown. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Sheet


@dataclass(frozen=True)
class Text:
    """A paragraph or, with a `level`, a heading; its figures come from `records`."""

    words: str
    level: int = 0
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Origins:
    """The records behind the figures above, by what each row of them belongs to."""

    rows: tuple[tuple[str, tuple[Record, ...]], ...]


Block = Text | Sheet | Origins


def origins(sheet: Sheet) -> Origins:
    """Those of a table's cells, row by row."""
    rows = (
        (row[0].text(), once(record for cell in row for record in cell.records))
        for row in sheet.rows
    )
    return Origins(tuple((label, records) for label, records in rows if records))


def once(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple({record.name: record for record in records}.values())


def markdown(blocks: Sequence[Block], store: ReferenceStore) -> str:
    """A page as it lies in results/tables; its links lead to the files of the records."""
    return "\n\n".join(part for block in blocks if (part := _markdown(block, store))) + "\n"


def _markdown(block: Block, store: ReferenceStore) -> str:
    if isinstance(block, Text):
        return f"{'#' * block.level} {block.words}".strip()
    if isinstance(block, Sheet):
        return "\n".join(
            line for line in render([block], "markdown").splitlines() if line.startswith("|")
        )
    return folded(block, store)


def folded(found: Origins, store: ReferenceStore) -> str:
    """A list that opens on a click: a line a row, a link a record; '' where there are none."""
    lines = []
    for label, records in found.rows:
        kinds = itertools.groupby(
            sorted(records, key=lambda record: record.kind), key=lambda record: record.kind
        )
        links = (
            f"{kind} "
            + " ".join(f"[{record.id[:6]}](../reference/{store.file_of(record)})" for record in own)
            for kind, own in kinds
        )
        lines.append(f"- {label}: {', '.join(links)}")
    return (
        "\n".join(
            [
                "<details><summary>The records behind these numbers</summary>",
                "",
                *lines,
                "",
                "</details>",
            ]
        )
        if lines
        else ""
    )
