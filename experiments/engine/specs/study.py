"""What a file outside this tree declares, and how its networks are told apart. No torch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import Protocol


@dataclass(frozen=True)
class Study:
    """Tables and protocols of one's own. The first of each is what a command runs."""

    tables: tuple[Table, ...]
    protocols: tuple[Protocol, ...]
    # Training seeds of a command that names none.
    seeds: tuple[int, ...] = (0,)

    def check(self) -> None:
        """Raise ValueError unless a command can choose among the tables and protocols."""
        for kind, parts in ((Table, self.tables), (Protocol, self.protocols)):
            name = kind.__name__
            if not isinstance(parts, tuple) or not all(isinstance(part, kind) for part in parts):
                raise ValueError(f"Study takes a tuple of {name}s, such as ({name.upper()},)")
            if not parts:
                raise ValueError(f"Study declares no {name}; give it at least one")
        _require_unique("tables", [table.number for table in self.tables])
        _require_unique("protocols", [protocol.name for protocol in self.protocols])

        # A command names a row by its label, and a seed by its number.
        for table in self.tables:
            if not table.rows:
                raise ValueError(f"table {table.number} has no rows; give it at least one")
            _require_unique(
                f"rows of table {table.number}",
                [row.label for row in (*table.rows, *table.outside)],
            )
        _require_unique("seeds", self.seeds)
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError("Study takes at least one seed, a number from 0 on")


def _require_unique(what: str, names: Any) -> None:
    if len(set(names)) < len(names):
        listed = ", ".join(map(str, names))
        raise ValueError(f"two {what} have the same name: {listed}; give each its own")


def sign(declared: Any, names: Set[str], digest: str) -> Any:
    """Return a declaration whose networks carry a digest where a study's code makes them.

    Args:
        declared: a Study, or a part of it.
        names: what the study registered, networks and mixers.
        digest: of the study's code.
    """
    if isinstance(declared, Backbone):
        return replace(declared, code=digest) if _mentions(_content(declared), names) else declared
    if isinstance(declared, tuple):
        return tuple(sign(part, names, digest) for part in declared)
    if not is_dataclass(declared) or isinstance(declared, type):
        return declared

    # What shrinks a network may bring in the study's mixer.
    parts = {f.name: sign(getattr(declared, f.name), names, digest) for f in fields(declared)}
    signed = replace(declared, **parts)
    if isinstance(signed, Row) and signed.backbone and _mentions(_shrinking(signed), names):
        signed = replace(signed, backbone=replace(signed.backbone, code=digest))
    return signed


def _content(backbone: Backbone) -> list[Any]:
    return [backbone.name, backbone.options]


def _shrinking(row: Row) -> list[Any]:
    small = [] if isinstance(row.small, Backbone) else [row.small]
    return [*small, *row.matched.values()]


def _mentions(value: Any, names: Set[str]) -> bool:
    """Return whether one of the names stands in a value, however deep."""
    if isinstance(value, dict):
        return any(_mentions(part, names) for part in value.values())
    if isinstance(value, tuple | list):
        return any(_mentions(part, names) for part in value)
    return isinstance(value, str) and value in names
