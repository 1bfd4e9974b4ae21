"""The rows and tables that a declaration is made of. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.engine.specs.spec import Backbone, Cost, Data, Diffusion, Recipe, Sampler


@dataclass(frozen=True)
class Method:
    """How a paper trains and samples its network, and where that is said; `data` are its own where no protocol has them."""

    diffusion: Diffusion
    recipe: Recipe
    sampler: Sampler
    source: str
    data: Data | None = None


@dataclass(frozen=True)
class Row:
    """A declared row: the network as published and, for small protocols, the options that shrink it.

    `small` can also be a network of its own, which several rows share. `published` is the row's key in the table's CSV;
    None where the paper has no such row. Without a `backbone` the row holds published numbers alone. `method` is its
    paper's, None where that is the protocols'. `costs` are the networks that make the published system, where it is not
    the backbone alone at 32x32x4. A `heavy` row is timed on a CPU only where it is named. In pixels a `classifier` guides
    the network and an `upsampler` follows it: rows too, of networks with methods of their own. Under its own recipe the
    network continues that of `start`, trained at 256 pixels.
    """

    label: str
    backbone: Backbone | None
    small: dict[str, Any] | Backbone
    published: str | None
    note: str = ""
    method: Method | None = None
    costs: tuple[Cost, ...] = ()
    heavy: bool = False
    classifier: Row | None = None
    upsampler: Row | None = None
    start: Row | None = None


@dataclass(frozen=True)
class Table:
    """Declared rows with their source; `published` names the CSV under results/published and its key columns.

    `outside` rows are run and shown only when they are named. `baseline` is the row that the others are compared with:
    the one labelled `against`, else the first. `conditions` are those of the published scores.
    """

    number: int
    title: str
    source: str
    published: str
    key: tuple[str, ...]
    rows: tuple[Row, ...]
    outside: tuple[Row, ...] = ()
    counts_only: bool = False
    timed: bool = True
    against: str | None = None
    conditions: str = "ImageNet 256, 400K steps"

    @property
    def baseline(self) -> Row:
        return next(row for row in self.rows if self.against in (None, row.label))

    def row(self, label: str) -> Row:
        """The row of this label, `outside` ones too; ValueError names the known ones."""
        known = {row.label: row for row in (*self.rows, *self.outside)}
        if label not in known:
            raise ValueError(
                f"table {self.number} has no row {label!r}; known: {', '.join(map(repr, known))}"
            )
        return known[label]


def table_of(label: str, tables: Mapping[int, Table], meaning: Callable[[Row], object]) -> Table:
    """The table that declares a row of this label with a network, the first of several if `meaning` makes the same of it in all; else ValueError."""
    found = [
        table
        for _, table in sorted(tables.items())
        if not table.counts_only
        and any(row.label == label and row.backbone for row in (*table.rows, *table.outside))
    ]
    if not found:
        raise ValueError(
            f"no table has a network as row {label!r}; --table with one of {', '.join(map(str, sorted(tables)))} lists that table's"
        )
    if any(meaning(table.row(label)) != meaning(found[0].row(label)) for table in found[1:]):
        raise ValueError(
            f"row {label!r} is not the same in all of tables {', '.join(str(table.number) for table in found)}; say which with --table"
        )
    return found[0]
