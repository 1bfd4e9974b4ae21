"""One self-contained page with every claim, table and figure: `python -m analysis.report`. No server, no network, no torch.

The page needs the extra `report` to be built (plotly and itables ship the JavaScript that is embedded), not to be read.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from analysis.build import FIGURES, attempt
from analysis.claims.judge import claims_sheet
from analysis.figures.style import png
from analysis.page.browser import timing
from analysis.page.fragments import (
    figure,
    grids,
    inert,
    lacking,
    problem_list,
    prose,
    record_data,
    table,
    tiles,
)
from analysis.page.scatter import views
from analysis.query import ReferenceStore
from analysis.tables.agreement_page import agreement_blocks
from analysis.tables.pages import Text
from analysis.tables.paper import SHEETS
from experiments.declared.protocols import CIFAR10_SMALL, DIGITS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Cell, Sheet

HERE = Path(__file__).resolve().parent
SECTIONS = (
    "claims",
    "scatter-section",
    "tables",
    "figures",
    "samples",
    "digits",
    "counts",
    "provenance",
)


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        help="then open it in a headless Chromium and say after how long it answers",
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


def build_page(store: ReferenceStore) -> tuple[str, list[str]]:
    """The page, and what could not be built, which the page names too. ValueError where the extra `report` is missing."""
    plotly, datatables, style = _libraries()
    problems: list[str] = []

    def sheet(
        name: str, make: Callable[[ReferenceStore], Sheet], identifier: str
    ) -> tuple[Sheet, str]:
        with store.noting() as noted:
            made = attempt(name, lambda: make(store), None, problems) or Sheet(
                f"{name}: {problems[-1].partition(': ')[2]}", [("", "gap")]
            )
        return made, table(made, identifier, noted.values())

    claims, claimed = sheet("claims", claims_sheet, "claims-table")
    shown = [
        f"<div{' class=words' if name == 'table6' else ''}>{sheet(name, make, name)[1]}</div>"
        for name, make in SHEETS.items()
        if name != "counts"
    ]
    drawn = [_figure(name, draw, store, problems) for name, draw in FIGURES.items()]
    pages = [
        prose(
            attempt(
                p.name,
                lambda p=p: agreement_blocks(store, p),
                [Text(f"{p.name} could not be built", 1)],
                problems,
            )
        )
        for p in (DIGITS, CIFAR10_SMALL)
    ]
    scattered = attempt("scatter", lambda: views(store), [], problems)
    parts = [
        f'<section id="claims"><h2>Claims</h2>{tiles(claims)}<div class="words">{claimed}</div></section>',
        '<section id="scatter-section"><h2>Score against cost</h2><p><label>View: <select id="view"></select></label> A filled mark leads to its records.</p><div id="scatter"></div></section>',
        f'<section id="tables"><h2>Tables</h2>{"".join(shown)}</section>',
        f'<section id="figures"><h2>Figures</h2><div class="grid">{"".join(drawn)}</div></section>',
        f'<section id="samples"><h2>Samples</h2>{grids(store.root / "figures" / "samples", store, problems)}</section>',
        f'<section id="digits">{"".join(pages)}</section>',
        f'<section id="counts"><h2>Honest counts</h2>{sheet("counts", SHEETS["counts"], "counts-table")[1]}</section>',
        f'<section id="provenance"><h2>Environment and provenance</h2><div class="words">{sheet("provenance", provenance_sheet, "provenance-table")[1]}</div></section>',
    ]
    problems = store.problems + problems
    data = {
        "datatables": datatables,
        "plotly": plotly,
        "records": record_data(store),
        "views": json.dumps(scattered),
    }
    navigation = "".join(
        f'<a href="#{name}">{name.removesuffix("-section")}</a>' for name in SECTIONS
    )
    page = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>DiCo bench: what was reproduced</title><style>{style}</style><style>{(HERE / 'page' / 'page.css').read_text()}</style></head><body>",
        "<header><h1>DiCo bench: what was reproduced</h1><p>Every table, figure and claim of arXiv:2505.11196 beside what this project counted, timed, trained and scored. ",
        f"Numbers with a dotted line lead to their records, as do the links below tables, figures and paragraphs. A dash is a gap.</p>{problem_list(problems)}</header><main><nav>{navigation}</nav>",
        *parts,
        "</main><dialog><form method=dialog><button autofocus>close</button></form><h3></h3><div></div></dialog>",
        *(
            f'<script type="text/plain" id="{name}">{inert(text)}</script>'
            for name, text in data.items()
        ),
        f'<script type="module">{(HERE / "page" / "page.js").read_text()}</script></body></html>',
    ]
    return "\n".join(page), problems


def provenance_sheet(store: ReferenceStore) -> Sheet:
    """One row a kind of record and environment that it comes from."""
    columns = [
        "records",
        "kind",
        "status",
        "commit",
        "uncommitted changes",
        "device",
        "torch",
        "python",
        "precision flags",
    ]
    sheet = Sheet("Where the committed records come from", [("", name) for name in columns])
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in store.all_records():
        made = record.provenance
        flags = ", ".join(
            f"{name} {'on' if on else 'off'}"
            for name, on in sorted(made["precision_flags"].items())
        )
        device = (
            made["device"]
            if made["device"] != "cpu"
            else f"{made['cpu']}, {made['cpu_count']} cores"
        )
        key = (
            record.kind,
            record.status,
            (made["commit"] or "unknown")[:12],
            "yes" if made["dirty"] else "no",
            device,
            made["torch"],
            made["python"],
            flags,
        )
        found.setdefault(key, []).append(record)
    sheet.rows = [
        [Cell(float(len(own)), None, 0, records=tuple(own)), *(Cell(label=word) for word in key)]
        for key, own in sorted(found.items())
    ]
    return sheet


def _libraries() -> tuple[str, str, str]:
    """plotly.js, the DataTables module and its style, from the packages that ship them."""
    try:
        plotly = files("plotly") / "package_data" / "plotly.min.js"
        bundle = files("itables") / "html"
        return (
            plotly.read_text(encoding="utf-8"),
            (bundle / "dt_bundle.js").read_text(encoding="utf-8"),
            (bundle / "dt_bundle.css").read_text(encoding="utf-8"),
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"the page embeds plotly.js and DataTables, and {error}; pip install -e .[report]"
        ) from None


def _figure(
    name: str, draw: Callable[[ReferenceStore], Any], store: ReferenceStore, problems: list[str]
) -> str:
    caption = " ".join(inspect.cleandoc(draw.__doc__).split())
    with store.noting() as noted:
        image = attempt(f"figure {name}", lambda: png(draw(store)), None, problems)
    return (
        figure(image, caption, noted.values())
        if image
        else lacking(f"{name} could not be built: {problems[-1].partition(': ')[2]}")
    )


if __name__ == "__main__":
    raise SystemExit(main())
