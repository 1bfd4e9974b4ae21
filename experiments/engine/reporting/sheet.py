from __future__ import annotations

import math
from dataclasses import dataclass, field

from experiments.engine.records.store import Record


@dataclass(frozen=True)
class Cell:
    """A value with an optional error, or words ('failed'); neither is a gap.

    `records` are the records it was computed from; `best` marks what is better than every other row, resolved.
    """

    value: float | None = None
    error: float | None = None
    digits: int = 2
    words: str = ""
    records: tuple[Record, ...] = ()
    best: bool = False

    def text(self) -> str:
        if self.words:
            return self.words
        if self.value is None or math.isnan(self.value):
            return "-"
        error = (
            ""
            if self.error is None or math.isnan(self.error)
            else f" ±{self.error:.{self.digits}f}"
        )
        return f"{self.value:z.{self.digits}f}{error}"  # no minus before a zero


@dataclass
class Sheet:
    """Columns are (group, name); rows hold one cell a column; notes stand below."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
