"""Rebuild results/tables and results/figures from committed records: `python -m analysis.build`.

It needs neither torch nor a network. It builds all that it can, names the rest at the end, and
exits with status 1 if there is any.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from analysis.claims.judge import claims_sheet
from analysis.evidence.page import evidence_page
from analysis.evidence.pairs import evidence_csv
from analysis.figures.catalogue import FIGURES
from analysis.figures.style import save
from analysis.options import add_store_options
from analysis.query import ReferenceStore
from analysis.reference import Problem
from analysis.tables.pages import folded, origins
from analysis.tables.paper import SHEETS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.reporting.markup import csv_table, markdown_rows
from experiments.engine.reporting.sheet import Sheet, Topic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The headings of the parts of a table.
HEADINGS = {
    Topic.COUNTS: "Counts",
    Topic.SPEED: "Speed",
    Topic.SCORES: "Scores",
    Topic.HELD_OUT: "Scores of what no training has seen",
}

T = TypeVar("T")
U = TypeVar("U")


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables",
        action="store_true",
        help="build tables, claims and the page of evidence, but no figures",
    )
    add_store_options(parser)
    args = parser.parse_args()

    store = ReferenceStore(args.results, args.published)
    problems = build(store, with_figures=not args.tables)
    folders = [store.root / "tables"] + ([] if args.tables else [store.root / "figures"])
    print(f"built {' and '.join(map(str, folders))}")
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def build(store: ReferenceStore, with_figures: bool = True) -> list[Problem]:
    """Write every table, page and figure; return what could not be built or was left out."""
    problems: list[Problem] = []
    for name, make_sheet in (SHEETS | {"claims": claims_sheet}).items():
        sheet = attempt(name, partial(make_sheet, store), None, problems)
        if sheet is not None:
            write_sheet(store, name, sheet)

    # The page of evidence stands beside the tables.
    attempt("evidence", partial(_write_evidence, store), None, problems)

    # A figure that cannot be drawn does not keep the others back.
    if with_figures:
        for name, draw in FIGURES.items():
            attempt(f"figure {name}", partial(_write_figure, store, name, draw), None, problems)
    return store.problems + problems


def attempt(name: str, make: Callable[[], T], otherwise: U, problems: list[Problem]) -> T | U:
    """What `make` returns; or, if what it needs is missing or unfit, `otherwise` and a problem."""
    try:
        return make()
    except KeyError as error:
        problems.append(Problem(name, f"records or published data lack {error}"))
    except ValueError as error:
        problems.append(Problem(name, str(error)))
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        reason = f"records or published data are not what was expected: {error}"
        problems.append(Problem(name, reason))
    return otherwise


def write_sheet(store: ReferenceStore, name: str, sheet: Sheet) -> None:
    """Write a table as one Markdown file, and as one narrow CSV file per topic."""
    _write(store, f"{name}.md", sheet_markdown(store, sheet))
    parts = list(sheet_parts(sheet))
    for topic, part in parts:
        suffix = f"_{topic.value}" if len(parts) > 1 else ""
        _write(store, f"{name}{suffix}.csv", csv_table(part))


def sheet_parts(sheet: Sheet) -> Iterator[tuple[Topic, Sheet]]:
    """The narrow tables that a wide one is written as, without columns that are all gaps."""
    printed = sheet.without_empty_columns()
    topics = printed.topics()
    if len(topics) < 2:
        yield Topic.ROW, printed
        return
    for topic in topics:
        yield topic, printed.about(topic)


def sheet_markdown(store: ReferenceStore, sheet: Sheet) -> str:
    """A table with its notes, a section per topic, and links to its records."""
    parts = list(sheet_parts(sheet))
    blocks = [f"# {sheet.title}"]
    for topic, part in parts:
        if len(parts) > 1:
            blocks.append(f"## {HEADINGS[topic]}")
        blocks.append("\n".join(markdown_rows(part)))

        # notes about the whole table follow once, at the end
        own = [note for note in part.notes if len(parts) == 1 or note.kind.topic is topic]
        if own:
            blocks.append("\n".join(f"- {note.text}" for note in own))
    if len(parts) > 1:
        common = [note for note in sheet.notes if note.kind.topic is Topic.ROW]
        if common:
            blocks.append("## All parts")
            blocks.append("\n".join(f"- {note.text}" for note in common))
    links = folded(origins(sheet), store)
    return "\n\n".join([*blocks, links] if links else blocks) + "\n"


def _write_figure(
    store: ReferenceStore, name: str, draw: Callable[[ReferenceStore], Figure]
) -> None:
    save(draw(store), store.root / "figures", name)


def _write_evidence(store: ReferenceStore) -> None:
    _write(store, "evidence.md", evidence_page(store))
    _write(store, "evidence.csv", evidence_csv(store))


def _write(store: ReferenceStore, name: str, text: str) -> None:
    with written_whole(store.root / "tables" / name) as file:
        file.write(text.encode())


if __name__ == "__main__":
    raise SystemExit(main())
