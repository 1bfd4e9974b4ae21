"""Rebuild results/tables and results/figures from the committed records and published data: `python -m analysis.build`.

No torch, no network. What cannot be built is named at the end, the rest is built, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis.claims.judge import claims_sheet
from analysis.figures.catalogue import FIGURES
from analysis.figures.style import save
from analysis.query import ReferenceStore
from analysis.tables import agreement as science
from analysis.tables.pages import folded, origins
from analysis.tables.paper import SHEETS
from experiments.declared.protocols import CIFAR10_SMALL, DIGITS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.stages import Protocol

SUFFIXES = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables",
        action="store_true",
        help="tables, claims and the pages on small protocols only, no figures",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    parser.add_argument(
        "--published",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of published numbers (default: results/published)",
    )
    args = parser.parse_args()
    store = ReferenceStore(args.results, args.published)
    problems = build(store, with_figures=not args.tables)
    print(
        f"built {store.root / 'tables'}" + ("" if args.tables else f" and {store.root / 'figures'}")
    )
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def build(store: ReferenceStore, with_figures: bool = True) -> list[str]:
    """Write every table, page and figure; what was wrong, in words."""
    problems: list[str] = []
    for name, make in (SHEETS | {"claims": claims_sheet}).items():
        attempt(name, lambda name=name, make=make: _write(store, name, make(store)), None, problems)
    for protocol in (DIGITS, CIFAR10_SMALL):
        attempt(protocol.name, lambda protocol=protocol: _page(store, protocol), None, problems)
    for name, draw in FIGURES.items() if with_figures else ():
        attempt(
            f"figure {name}",
            lambda name=name, draw=draw: save(draw(store), store.root / "figures", name),
            None,
            problems,
        )
    return store.problems + problems


def attempt(name: str, make: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    """What `make` gives, or, where what it needs is missing or unfit, `otherwise` and a problem more."""
    try:
        return make()
    except KeyError as error:
        problems.append(f"{name}: records or published data lack {error}")
    except ValueError as error:
        problems.append(f"{name}: {error}")
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        problems.append(f"{name}: records or published data are not what was expected: {error}")
    return otherwise


def _page(store: ReferenceStore, protocol: Protocol) -> None:
    with written_whole(store.root / "tables" / f"{protocol.name}.md") as file:
        file.write(science.page(store, protocol).encode())


def _write(store: ReferenceStore, name: str, sheet: Sheet) -> None:
    """The table in every form; below the Markdown stand links to its records, which HTML holds in its cells."""
    for form, suffix in SUFFIXES.items():
        text = render([sheet], form)
        if form == "markdown" and (found := folded(origins(sheet), store)):
            text += f"\n{found}\n"
        with written_whole(store.root / "tables" / f"{name}.{suffix}") as file:
            file.write(text.encode())


if __name__ == "__main__":
    raise SystemExit(main())
