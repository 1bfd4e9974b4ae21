"""What a command chooses among: the declarations of this tree, or those of a study. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.records.code import load_study
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import Protocol


@dataclass(frozen=True)
class Choices:
    """The declarations among which a command chooses, and what it takes without an option."""

    tables: dict[int, Table]
    protocols: dict[str, Protocol]
    # None: the command line must name a table.
    table: int | None = None
    protocol: str = "digits"
    seeds: tuple[int, ...] = (0,)
    # Whether the command line begins with the file that declares them.
    of_study: bool = False


def choices_of(path: Path) -> Choices:
    """Load a study, whose code runs now, and return what it declares.

    Raises:
        ValueError: in one line, for what is no study.
    """
    study = load_study(path)
    return Choices(
        {table.number: table for table in study.tables},
        {protocol.name: protocol for protocol in study.protocols},
        study.tables[0].number,
        study.protocols[0].name,
        study.seeds,
        of_study=True,
    )


def choices_from(arguments: Sequence[str], own: Choices) -> Choices:
    """Return what the study that --study names declares, or else this tree's declarations.

    Raises:
        ValueError: in one line, for what is no study.
    """
    # The other options take their choices from the study, so its file comes before them.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_study_option(first)
    path = first.parse_known_args(arguments)[0].study
    return own if path is None else choices_of(path)


def labels_of(tables: Iterable[Table]) -> list[str]:
    """Return the labels of all rows that these tables declare."""
    return [row.label for table in tables for row in (*table.rows, *table.outside)]


def add_study_argument(parser: argparse.ArgumentParser) -> None:
    """Add the file of a study, with which a command line begins."""
    parser.add_argument(
        "study", type=Path, metavar="STUDY", help="file that declares tables and protocols"
    )


def add_study_option(parser: argparse.ArgumentParser) -> None:
    """Add --study, which takes rows and protocols from a study's file."""
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="study that declares the rows and protocols"
    )


def add_table_option(parser: argparse.ArgumentParser, choices: Choices) -> None:
    titles = ", ".join(f"{number} ({table.title})" for number, table in choices.tables.items())
    whose = "the study's" if choices.of_study else "the paper's"
    default = "" if choices.table is None else f" (default: {choices.table})"
    parser.add_argument(
        "--table",
        type=int,
        choices=list(choices.tables),
        required=choices.table is None,
        default=choices.table,
        help=f"number of {whose} table: {titles}{default}",
    )
