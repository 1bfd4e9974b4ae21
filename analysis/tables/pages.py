"""Pages of text and tables that know the records behind them, and their Markdown. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.markup import markdown_rows
from experiments.engine.reporting.sheet import Sheet

# the digits of a record's id in the text of a link
ID_DIGITS = 6


@dataclass(frozen=True)
class Text:
    """A paragraph or a heading."""

    words: str
    # 1 for the largest heading, 0 for a paragraph
    level: int = 0
    # the records behind its figures
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Origins:
    """The records behind the figures above, by the row that they belong to."""

    rows: tuple[tuple[str, tuple[Record, ...]], ...]


Block = Text | Sheet | Origins


def origins(sheet: Sheet) -> Origins:
    """The records of a table's cells, row by row."""
    first = sheet.columns[0].key
    rows = []
    for row in sheet.rows:
        records = once(record for cell in row.values() for record in cell.records)
        if records:
            rows.append((row[first].text(), records))
    return Origins(tuple(rows))


def once(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records without repetitions."""
    return tuple({record.name: record for record in records}.values())


def markdown(blocks: Sequence[Block], store: ReferenceStore) -> str:
    """A page for results/tables; its links lead to the files of the records."""
    texts = [_markdown(block, store) for block in blocks]
    return "\n\n".join(text for text in texts if text) + "\n"


def _markdown(block: Block, store: ReferenceStore) -> str:
    if isinstance(block, Text):
        return f"{'#' * block.level} {block.words}".strip()
    if isinstance(block, Sheet):
        return "\n".join(markdown_rows(block.without_empty_columns()))
    return folded(block, store)


def folded(block: Origins, store: ReferenceStore) -> str:
    """A list that opens on a click: a line per row, a link per record; '' without records."""
    if not block.rows:
        return ""
    opening = "<details><summary>The records behind these numbers</summary>"
    lines = [f"- {label}: {_links(records, store)}" for label, records in block.rows]
    return "\n".join([opening, "", *lines, "", "</details>"])


def _links(records: Iterable[Record], store: ReferenceStore) -> str:
    """Links to the records, kind by kind."""

    def kind_of(record: Record) -> str:
        return record.kind

    kinds = []
    for kind, group in itertools.groupby(sorted(records, key=kind_of), key=kind_of):
        links = [
            f"[{record.id[:ID_DIGITS]}](../reference/{store.file_of(record)}){_origin_of(record)}"
            for record in group
        ]
        kinds.append(f"{kind} {' '.join(links)}")
    return ", ".join(kinds)


def _origin_of(record: Record) -> str:
    """Where a contributed record comes from, in brackets; '' for our own."""
    origin = record.provenance.get("origin")
    return f" (by {origin})" if origin else ""
