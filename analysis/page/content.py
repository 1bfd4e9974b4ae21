"""What stands on the report page: tables, images and text, each with the records behind it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from analysis.claims.finding import Evidence
from analysis.query import ReferenceStore
from analysis.reference import Problem
from analysis.tables.pages import Block, Origins, Text
from experiments.engine.machine.system_errors import explain, is_of_files
from experiments.engine.records.store import Record
from experiments.engine.reporting.markup import grouped
from experiments.engine.reporting.sheet import Sheet

BROAD = 860  # pixels of width from which an image takes the whole page


@dataclass(frozen=True)
class Table:
    """A table in a frame that scrolls sideways."""

    sheet: Sheet
    # Of the table's element; empty for none.
    identifier: str = ""
    # Behind the whole table; its title leads to them.
    records: tuple[Record, ...] = ()

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of columns with their lengths; none if no column has a group."""
        groups = grouped(self.sheet)
        return groups if any(name for name, _ in groups) else []


@dataclass(frozen=True)
class Image:
    """A figure or a grid of samples."""

    png: bytes
    caption: str
    # Behind the image; the caption leads to them.
    records: tuple[Record, ...] = ()
    # Whether it is a grid of samples.
    samples: bool = False

    @cached_property
    def width(self) -> int:
        """Pixels."""
        from PIL import Image as Pillow

        return Pillow.open(io.BytesIO(self.png)).width

    @property
    def broad(self) -> bool:
        """Whether it takes the whole width of the page."""
        return self.width >= BROAD

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Missing:
    """A figure that could not be drawn."""

    # Says why.
    caption: str


@dataclass(frozen=True)
class Tile:
    """A button that shows only the claims of one level of evidence."""

    level: str
    # Of the claims that have it.
    count: int


def tiles(claims: Sheet) -> list[Tile]:
    """Return a tile for each level of evidence, none if the claims could not be judged."""
    if not claims.has("evidence"):
        return []
    levels = [cell.choice for cell in claims.values("evidence")]
    return [Tile(level.value, levels.count(level)) for level in Evidence]


def evidence_column(claims: Sheet) -> int | None:
    """Return the position of the column that tells the evidence of a claim, if there is one."""
    keys = [column.key for column in claims.columns]
    return keys.index("evidence") if "evidence" in keys else None


def text_and_tables(blocks: Sequence[Block]) -> list[Text | Table]:
    """Return the blocks of a page of text.

    Lists of records are left out: on this page every cell and paragraph leads to its own records.
    """
    shown: list[Text | Table] = []
    for block in blocks:
        if isinstance(block, Text):
            shown.append(block)
        elif not isinstance(block, Origins):
            shown.append(Table(block.without_empty_columns()))
    return shown


def sample_grids(folder: Path, store: ReferenceStore, problems: list[Problem]) -> list[Image]:
    """Return the sample grids of a folder, each with what its file says about its run.

    A damaged file is left out and becomes a problem.
    """
    from PIL import Image as Pillow

    from analysis.grid import CAPTION, RECORDS

    committed = {record.name: record for record in store.all_records()}
    grids = []
    for path in sorted(folder.glob("*.png")):
        try:
            about = Pillow.open(path).info
        except OSError as error:
            reason = f"{path.name} is no image; draw it again with python -m analysis.grid"
            if is_of_files(error):
                reason = explain(error, "read", path)
            problems.append(Problem("samples", reason))
            continue
        caption = about.get(CAPTION) or f"{path.name}: the file does not name its run"
        names = about.get(RECORDS, "").split()
        records = tuple(committed[name] for name in names if name in committed)
        grids.append(Image(path.read_bytes(), caption, records, samples=True))
    return grids


def records_json(store: ReferenceStore) -> str:
    """Return every committed record by name, with its file, as JSON."""
    records = {
        record.name: vars(record) | {"file": store.file_of(record)}
        for record in store.all_records()
    }
    return json.dumps(records, sort_keys=True)


def names_of(records: Iterable[Record]) -> str:
    """Return the names by which the page's script finds records."""
    return " ".join(record.name for record in records)
