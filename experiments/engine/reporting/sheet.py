"""A table before it is written in any format: columns found by key, cells and notes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from experiments.engine.records.store import Record


class Topic(Enum):
    """What a column or a note is about: a wide table is written as one narrow file per topic."""

    ROW = "row"  # names the row; stands in every file
    COUNTS = "counts"
    SPEED = "speed"
    SCORES = "scores"
    HELD_OUT = "held_out"  # scores of what no training has seen, where a table has many


class Kind(Enum):
    """How a column is aligned."""

    NUMBER = "number"  # to the right
    PROSE = "prose"  # to the left


class Tone(Enum):
    """How a terminal colours a cell."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Column:
    """One column of a sheet."""

    # unique within the sheet; cells and edits name the column by it
    key: str
    # what stands above the column
    title: str
    # what stands above neighbouring columns of the same group; empty for none
    group: str = ""
    # decimals of a cell that does not say its own
    digits: int = 2
    kind: Kind = Kind.NUMBER
    topic: Topic = Topic.ROW

    @property
    def full_title(self) -> str:
        """The title after its group, for formats with one heading row."""
        return f"{self.group}: {self.title}" if self.group else self.title


@dataclass(frozen=True)
class Cell:
    """A value with an optional error, or a label such as 'failed'; without either, a gap."""

    value: float | None = None
    error: float | None = None
    # decimals of value and error; None takes the column's
    digits: int | None = None
    # printed in place of the value
    label: str = ""
    # what the label stands for where it is a choice among words; queries read this, not the label
    choice: Enum | None = None
    # the records that the cell was computed from
    records: tuple[Record, ...] = ()
    # whether the row is better than every other one, beyond the noise
    best: bool = False
    tone: Tone = Tone.PLAIN

    @property
    def is_gap(self) -> bool:
        """Whether there is nothing to print."""
        return not self.label and (self.value is None or math.isnan(self.value))

    def text(self, digits: int = 2) -> str:
        """The cell as it is printed; `digits` counts where the cell has none of its own."""
        if self.label:
            return self.label
        if self.value is None or math.isnan(self.value):
            return "-"

        # "z" prints no minus sign before a zero
        digits = digits if self.digits is None else self.digits
        number = f"{self.value:z.{digits}f}"
        if self.error is None or math.isnan(self.error):
            return number
        return f"{number} ±{self.error:.{digits}f}"


GAP = Cell()
FAILED = Cell(label="failed", tone=Tone.BAD)
# A score that a row cannot have, such as an error in noise of a network that predicts tokens.
UNDEFINED = Cell(label="not defined")


class NoteKind(Enum):
    """What a note below a table is about."""

    COUNTS = "counts"  # how parameters and Gflops were counted
    SPEED = "speed"  # how rows were timed, and which timings compare
    SCORES = "scores"  # how rows were trained and scored, and which scores compare
    SEEDS = "seeds"  # rows with fewer training seeds than were chosen
    WARNING = "warning"  # what the record of a scored run warns of
    FAILURE = "failure"  # a stage that failed
    ROWS = "rows"  # what single rows are
    RECORDS = "records"  # commits, machines and flags of the records
    GENERAL = "general"  # everything else

    @property
    def topic(self) -> Topic:
        """The part of a split table below which the note stands; ROW is every part."""
        return NOTE_TOPICS.get(self, Topic.ROW)


NOTE_TOPICS = {
    NoteKind.COUNTS: Topic.COUNTS,
    NoteKind.SPEED: Topic.SPEED,
    NoteKind.SCORES: Topic.SCORES,
    NoteKind.SEEDS: Topic.SCORES,
    NoteKind.WARNING: Topic.SCORES,
}


@dataclass(frozen=True)
class Note:
    """A sentence below a table."""

    kind: NoteKind
    text: str
    # the records that the sentence was made from
    records: tuple[Record, ...] = ()


SheetRow = dict[str, Cell]


@dataclass
class Sheet:
    """A table: rows hold cells by the key of their column; a missing key is a gap."""

    title: str
    columns: list[Column]
    rows: list[SheetRow] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def column(self, key: str) -> Column:
        """The column of this key; KeyError for an unknown one."""
        return self.columns[self._position(key)]

    def has(self, key: str) -> bool:
        """Whether there is a column of this key."""
        return any(column.key == key for column in self.columns)

    def add_row(self, cells: SheetRow) -> None:
        """Append a row; every key must be a column's."""
        for key in cells:
            self._position(key)
        self.rows.append(cells)

    def add_column(self, column: Column, cells: Sequence[Cell], after: str | None = None) -> None:
        """Add a column with one cell per row, at the end or behind the column `after`."""
        assert not self.has(column.key), f"two columns of the key {column.key!r}"
        at = len(self.columns) if after is None else self._position(after) + 1
        self.columns.insert(at, column)
        for row, cell in zip(self.rows, cells, strict=True):
            row[column.key] = cell

    def replace_column(self, column: Column) -> None:
        """Put a column in the place of the one with the same key."""
        self.columns[self._position(column.key)] = column

    def note(self, kind: NoteKind, *texts: str) -> None:
        """Append notes of one kind."""
        self.notes += [Note(kind, text) for text in texts]

    def cells(self, row: SheetRow) -> Iterator[tuple[Column, Cell]]:
        """The cells of a row in the order of the columns, gaps included."""
        return ((column, row.get(column.key, GAP)) for column in self.columns)

    def values(self, key: str) -> list[Cell]:
        """The cells of a column, row by row."""
        self._position(key)
        return [row.get(key, GAP) for row in self.rows]

    def records(self) -> tuple[Record, ...]:
        """The records behind all cells, each once."""
        named = {r.name: r for row in self.rows for cell in row.values() for r in cell.records}
        return tuple(named.values())

    def without_empty_columns(self) -> Sheet:
        """The sheet without the columns that are gaps in every row; the first column stays."""
        kept = [
            column
            for at, column in enumerate(self.columns)
            if at == 0 or not self.rows or not all(cell.is_gap for cell in self.values(column.key))
        ]
        return replace(self, columns=kept)

    def about(self, topic: Topic) -> Sheet:
        """The columns and notes of one topic, with the columns that name the rows."""
        topics = (Topic.ROW, topic)
        return replace(
            self,
            columns=[column for column in self.columns if column.topic in topics],
            notes=[note for note in self.notes if note.kind.topic in topics],
        )

    def topics(self) -> list[Topic]:
        """The topics of the columns that are no names of rows, in the order of Topic."""
        present = {column.topic for column in self.columns}
        return [topic for topic in Topic if topic in present and topic is not Topic.ROW]

    def _position(self, key: str) -> int:
        for at, column in enumerate(self.columns):
            if column.key == key:
                return at
        known = ", ".join(repr(column.key) for column in self.columns)
        raise KeyError(f"no column {key!r} in {self.title!r}; known: {known}")
