"""The rows and tables that a declaration is made of. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.spec import (
    Backbone,
    Cost,
    Data,
    Diffusion,
    Recipe,
    Sampler,
    Tokenizer,
)
from experiments.engine.specs.weights import Weights

TableName = int | str


def read_table_name(text: str) -> TableName:
    """Return the number or the name of a table as a command line writes it."""
    return int(text) if text.isdecimal() else text


@dataclass(frozen=True)
class Method:
    """How a paper trains and samples its network."""

    diffusion: Diffusion
    recipe: Recipe
    sampler: Sampler
    # Where the paper or its code says so.
    source: str
    # What it trains on, where no protocol has that.
    data: Data | None = None
    # Of an autoregressive network: what makes the tokens that it predicts, in the place of noise.
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class FineTuning:
    """How a row continues another row's training, under every protocol."""

    # Whose averaged network it starts from, trained at full length and at its own rate.
    parent: Row
    # Its steps, as a share of the protocol's. Warm-up and average shrink alike.
    share: float


@dataclass(frozen=True)
class Row:
    """A row of a table: a network, a system of networks, or published numbers alone."""

    label: str
    # The network as published; None: the row is not run. It holds published numbers, and the
    # counts of `costs`.
    backbone: Backbone | None
    # What small protocols train: the options that shrink the network, or another network, which
    # several rows can share.
    small: dict[str, Any] | Backbone = field(default_factory=dict)
    # The row's key in the table's CSV; None: the paper has no such row.
    published: str | None = None
    # What is to be known of the row, for the notes under a table.
    note: str = ""
    # The method of the row's own paper; None: that of the protocols.
    method: Method | None = None
    # The networks of the published system, where it is not the backbone alone at 32x32x4.
    costs: tuple[Cost, ...] = ()
    # Whether a CPU times the row only if it is named.
    heavy: bool = False
    # In pixels: a row whose network guides this one.
    classifier: Row | None = None
    # In pixels: a row whose network takes the samples to full size.
    upsampler: Row | None = None
    # By the side of the network's input: what brings the shrunk network to the share of the
    # baseline's MACs that the published networks have, where `small` does not.
    matched: Mapping[int, dict[str, Any]] = field(default_factory=dict, hash=False)
    # The row, trained at 256 pixels, that this one's network continues under its own recipe; or the
    # file of weights that it starts from under any recipe.
    start: Row | Weights | None = None
    # How the row continues another one's training; None: it begins from nothing or from `start`.
    tuning: FineTuning | None = None
    # With whose features the row's network is aligned in training.
    alignment: Alignment | None = None
    # A row whose trained network this one learns from, and what of it: 'blocks', the outputs of
    # whole levels, or 'self_attention'.
    teacher: Row | None = None
    mimics: str = "blocks"

    def require_backbone(self) -> Backbone:
        """Return the network.

        Raises:
            ValueError: if the row holds published numbers alone.
        """
        if self.backbone is None:
            raise ValueError(f"row {self.label!r} holds published numbers alone, and no network")
        return self.backbone

    @property
    def predicts_tokens(self) -> bool:
        """Return whether the network predicts a tokenizer's tokens, and no noise."""
        return self.method is not None and self.method.tokenizer is not None

    @property
    def network_label(self) -> str:
        """Return the label without what changes no network: guidance and a number of steps."""
        return self.label.removesuffix(" (w/ CFG)").partition(", ")[0]

    @property
    def is_upsampler(self) -> bool:
        """Return whether the network is given a smaller image beside the noise."""
        return self.method is not None and self.method.diffusion.low_res is not None


@dataclass(frozen=True)
class Table:
    """Declared rows with their source."""

    # Its number, or a name such as v2-11 for one of the second version of the paper.
    number: TableName
    title: str
    source: str
    # The CSV of its published numbers under results/published; "": no paper has the table.
    published: str = ""
    # The columns of the CSV that name a row.
    key: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    # Rows that are run and shown only if they are named.
    outside: tuple[Row, ...] = ()
    # Whether nothing is trained or scored.
    counts_only: bool = False
    # Whether a forward pass of its rows is timed.
    timed: bool = True
    # Label of the row that others are compared with; None: the first.
    against: str | None = None
    # Under which the published scores were measured.
    conditions: str = "ImageNet 256, 400K steps"

    @property
    def baseline(self) -> Row:
        """Return the row that the others are compared with."""
        return next(row for row in self.rows if self.against in (None, row.label))

    def row(self, label: str) -> Row:
        """Return the row of this label, among `outside` ones too.

        Raises:
            ValueError: for an unknown label; it names the known ones.
        """
        known = {row.label: row for row in (*self.rows, *self.outside)}
        if label not in known:
            labels = ", ".join(map(repr, known))
            raise ValueError(f"table {self.number} has no row {label!r}; known: {labels}")
        return known[label]

    def has_network(self, label: str) -> bool:
        """Return whether the table scores a network under this label."""
        if self.counts_only:
            return False
        rows = (*self.rows, *self.outside)
        return any(row.label == label and row.backbone for row in rows)


def in_order(tables: Mapping[TableName, Table]) -> list[Table]:
    """Return the tables by their numbers, and then those with names."""
    return [tables[name] for name in sorted(tables, key=lambda name: (isinstance(name, str), name))]


def table_of(
    label: str, tables: Mapping[TableName, Table], meaning: Callable[[Row], object]
) -> Table:
    """Return the first table that declares a network under a label.

    Args:
        label: of the row.
        tables: the tables by number.
        meaning: what the caller makes of a row. It must be the same in all tables with this label.

    Raises:
        ValueError: if no table has such a row, or if several have different ones.
    """
    matching = [table for table in in_order(tables) if table.has_network(label)]
    if not matching:
        numbers = ", ".join(str(table.number) for table in in_order(tables))
        raise ValueError(
            f"no table has a network as row {label!r}; "
            f"--table with one of {numbers} lists that table's"
        )

    # Several tables may declare the row, but then all must mean the same.
    first = meaning(matching[0].row(label))
    if any(meaning(table.row(label)) != first for table in matching[1:]):
        numbers = ", ".join(str(table.number) for table in matching)
        raise ValueError(
            f"row {label!r} is not the same in all of tables {numbers}; say which with --table"
        )
    return matching[0]
