"""Write one self-contained page with every claim, table and figure: `python -m analysis.report`.

The page needs no server and no network. Building it needs the extra `report` but no torch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

from analysis.build import FIGURES, attempt
from analysis.claims.judge import claims_sheet
from analysis.evidence.page import evidence_blocks
from analysis.figures.style import png
from analysis.options import add_store_options
from analysis.page.browser import timing
from analysis.page.content import (
    Image,
    Missing,
    Table,
    evidence_column,
    records_json,
    sample_grids,
    text_and_tables,
    tiles,
)
from analysis.page.provenance import provenance_sheet
from analysis.page.scatter import View, views
from analysis.page.templating import load_libraries, render_template
from analysis.query import ReferenceStore
from analysis.reference import Problem
from analysis.tables.pages import Block, Text
from analysis.tables.paper import SHEETS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.reporting.sheet import Column, Kind, Sheet


def main() -> int:
    """Run the command. Exit status: 0 all built, 1 something was left out, 2 bad input."""
    return run_command(write_page)


def write_page() -> int:
    """Write the page that the arguments ask for, and print what it lacks."""
    parser = Parser(description=__doc__)
    add_store_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FILE",
        help="page to write (default: results/report.html)",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="open the page in a headless Chromium and print how soon it answers",
    )
    args = parser.parse_args()

    store = ReferenceStore(args.results, args.published)
    page, problems = build_page(store)
    output = args.output or store.root / "report.html"
    with written_whole(output) as file:
        file.write(page.encode())
    print(f"built {output} ({len(page.encode()) / 1e6:.1f} MB)")
    for problem in problems:
        print(f"problem: {problem}")
    if args.time:
        print("\n".join(timing(output)))
    return 1 if problems else 0


def build_page(store: ReferenceStore) -> tuple[str, list[Problem]]:
    """Return the page, and what could not be built, which the page names too.

    Raises:
        ValueError: if the extra `report` is missing.
    """
    libraries = load_libraries()
    builder = Builder(store)
    claims = builder.table("claims", claims_sheet, "claims-table")
    no_views: list[View] = []
    scatter = attempt("scatter", lambda: views(store), no_views, builder.problems)
    content = {
        "claims": claims,
        "tiles": tiles(claims.sheet),
        "evidence_column": evidence_column(claims.sheet),
        "tables": [
            builder.table(name, make_sheet, name)
            for name, make_sheet in SHEETS.items()
            if name != "counts"
        ],
        "figures": [builder.figure(name) for name in FIGURES],
        "text": text_and_tables(builder.evidence()),
        "views": json.dumps(scatter),
        "samples": sample_grids(store.root / "figures" / "samples", store, builder.problems),
        "counts": builder.table("counts", SHEETS["counts"], "counts-table"),
        "provenance": builder.table("provenance", provenance_sheet, "provenance-table"),
        "records": records_json(store),
    }

    # The page names what it lacks, so it is rendered after all its parts were tried.
    problems = store.problems + builder.problems
    page = render_template("report.html", libraries=libraries, problems=problems, **content)
    return page, problems


class Builder:
    """Makes the content of the page, and collects what could not be made."""

    def __init__(self, store: ReferenceStore) -> None:
        self.store = store
        self.problems: list[Problem] = []

    def table(
        self, name: str, make_sheet: Callable[[ReferenceStore], Sheet], identifier: str
    ) -> Table:
        """Return a table that knows the records that were read for it."""
        with self.store.noting() as noted:
            sheet = attempt(name, lambda: self._printed(make_sheet), None, self.problems)
        if sheet is None:
            sheet = Sheet(self._last_problem(name), [Column("gap", "gap", kind=Kind.PROSE)])
        return Table(sheet, identifier, tuple(noted.values()))

    def _printed(self, make_sheet: Callable[[ReferenceStore], Sheet]) -> Sheet:
        return make_sheet(self.store).without_empty_columns()

    def figure(self, name: str) -> Image | Missing:
        """Return a figure with its caption, which is the docstring of its function."""
        draw = FIGURES[name]
        caption = " ".join(inspect.cleandoc(draw.__doc__ or "").split())
        with self.store.noting() as noted:
            image = attempt(f"figure {name}", lambda: png(draw(self.store)), None, self.problems)
        if image is None:
            return Missing(self._last_problem(f"{name} could not be built"))
        return Image(image, caption, tuple(noted.values()))

    def evidence(self) -> list[Block]:
        """Return the page of evidence."""
        missing: list[Block] = [Text("the page of evidence could not be built", 1)]
        return attempt("evidence", lambda: evidence_blocks(self.store), missing, self.problems)

    def _last_problem(self, name: str) -> str:
        """Return the last problem's reason, under a name of its own."""
        return f"{name}: {self.problems[-1].reason}"


if __name__ == "__main__":
    raise SystemExit(main())
