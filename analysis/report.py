"""One self-contained page with every claim, table and figure: `python -m analysis.report`. No server, no network, no torch.

The page needs the extra `report` to be built (plotly and itables ship the JavaScript that is embedded), not to be read.
"""

from __future__ import annotations

import argparse
import base64
import html
import inspect
import json
import re
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from analysis import science
from analysis.build import FIGURES
from analysis.claims import LEVELS, claims_sheet
from analysis.query import Sources
from analysis.style import png
from analysis.tables import SHEETS
from analysis.views import views
from experiments.engine.files import written_whole
from experiments.engine.render import render
from experiments.engine.report import Cell, Sheet
from experiments.protocols import CIFAR10_SMALL, DIGITS

HERE = Path(__file__).resolve().parent
SECTIONS = ("claims", "scatter-section", "tables", "figures", "digits", "counts", "provenance")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="results folder (default: results)")
    parser.add_argument("--published", type=Path, default=None, metavar="DIR", help="folder of published numbers (default: results/published)")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="page to write (default: results/report.html)")
    args = parser.parse_args()
    store = Sources(args.results, args.published)
    try:
        page, problems = build_page(store)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = args.output or store.root / "report.html"
    with written_whole(output) as file:
        file.write(page.encode())
    print(f"built {output} ({len(page.encode()) / 1e6:.1f} MB)")
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def build_page(store: Sources) -> tuple[str, list[str]]:
    """The page, and what could not be built, which the page names too. ValueError where the extra `report` is missing."""
    plotly, datatables, style = _libraries()
    problems: list[str] = []
    claims = _sheet("claims", lambda: claims_sheet(store), problems)
    parts = [
        f'<section id="claims"><h2>Claims</h2>{_tiles(claims)}<div class="words">{_table(claims, "claims-table")}</div></section>',
        '<section id="scatter-section"><h2>Score against cost</h2><p><label>View: <select id="view"></select></label></p><div id="scatter"></div></section>',
        '<section id="tables"><h2>Tables</h2>',
    ]
    for name, make in SHEETS.items():
        if name != "counts":
            parts.append(f'<div{" class=words" if name == "table6" else ""}>{_table(_sheet(name, lambda make=make: make(store), problems), name)}</div>')
    parts.append('</section><section id="figures"><h2>Figures</h2><div class="grid">')
    parts += [_figure(name, draw, store, problems) for name, draw in FIGURES.items()]
    parts += [_image(path.read_bytes(), f"Samples: {path.stem}.") for path in sorted((store.root / "figures" / "samples").glob("*.png"))]
    pages = "".join(_prose(_or(p.name, lambda p=p: science.page(store, p), f"# {p.name} could not be built", problems)) for p in (DIGITS, CIFAR10_SMALL))
    parts.append(f'</div></section><section id="digits">{pages}</section>')
    counts = _sheet("counts", lambda: SHEETS["counts"](store), problems)
    parts.append(f'<section id="counts"><h2>Honest counts</h2>{_table(counts, "counts-table")}</section>')
    origins = _sheet("provenance", lambda: provenance_sheet(store), problems)
    drawn = _or("scatter", lambda: views(store), [], problems)
    parts.append(f'<section id="provenance"><h2>Environment and provenance</h2><div class="words">{_table(origins, "provenance-table")}</div></section>')
    problems = store.problems + problems
    shown = _problems(problems)
    records = {record.name: vars(record) for record in store.all_records()}
    data = {"datatables": datatables, "plotly": plotly, "records": json.dumps(records, sort_keys=True), "views": json.dumps(drawn)}
    navigation = "".join(f'<a href="#{name}">{name.removesuffix("-section")}</a>' for name in SECTIONS)
    page = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>DiCo bench: what was reproduced</title><style>{style}</style><style>{(HERE / 'page' / 'page.css').read_text()}</style></head><body>",
        "<header><h1>DiCo bench: what was reproduced</h1><p>Every table, figure and claim of arXiv:2505.11196 beside what this project counted, timed, trained and scored. ",
        f"Numbers with a dotted line lead to their records. A dash is a gap.</p>{shown}</header><main><nav>{navigation}</nav>",
        *parts,
        "</main><dialog><form method=dialog><button autofocus>close</button></form><h3></h3><pre></pre></dialog>",
        *(f'<script type="text/plain" id="{name}">{_inert(text)}</script>' for name, text in data.items()),
        f'<script type="module">{(HERE / "page" / "page.js").read_text()}</script></body></html>',
    ]
    return "\n".join(page), problems


def _or(name: str, make: Any, otherwise: Any, problems: list[str]) -> Any:
    """What `make` gives, or, where what it needs is missing, `otherwise` and a problem more."""
    try:
        return make()
    except (ValueError, KeyError) as error:
        problems.append(f"{name}: {error}")
        return otherwise


def provenance_sheet(store: Sources) -> Sheet:
    """One row a kind of record and environment that it comes from."""
    columns = ["records", "kind", "status", "commit", "uncommitted changes", "device", "torch", "python", "precision flags"]
    sheet = Sheet("Where the committed records come from", [("", name) for name in columns])
    found: Counter[tuple[str, ...]] = Counter()
    for record in store.all_records():
        made = record.provenance
        flags = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in sorted(made["precision_flags"].items()))
        device = made["device"] if made["device"] != "cpu" else f"{made['cpu']}, {made['cpu_count']} cores"
        found[record.kind, record.status, (made["commit"] or "unknown")[:12], "yes" if made["dirty"] else "no", device, made["torch"], made["python"], flags] += 1
    sheet.rows = [[Cell(float(count), None, 0), *(Cell(words=word) for word in key)] for key, count in sorted(found.items())]
    return sheet


def _libraries() -> tuple[str, str, str]:
    """plotly.js, the DataTables module and its style, from the packages that ship them."""
    try:
        plotly = files("plotly") / "package_data" / "plotly.min.js"
        bundle = files("itables") / "html"
        return plotly.read_text(encoding="utf-8"), (bundle / "dt_bundle.js").read_text(encoding="utf-8"), (bundle / "dt_bundle.css").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"the page embeds plotly.js and DataTables, and {error}; pip install -e .[report]") from None


def _sheet(name: str, make: Any, problems: list[str]) -> Sheet:
    try:
        return make()
    except (ValueError, KeyError) as error:
        problems.append(f"{name}: {error}")
        return Sheet(f"{name} could not be built: {error}", [("", "gap")])


def _table(sheet: Sheet, name: str) -> str:
    made = render([sheet], "html").replace("<table>", f'<div class="wide"><table id="{name}">').replace("</table>", "</table></div>")
    return re.sub(r"<thead><tr>(<th colspan=\"\d+\"></th>)</tr>", "<thead>", made)


def _tiles(claims: Sheet) -> str:
    levels = [row[3].words for row in claims.rows if len(row) > 3]
    tiles = (f'<button type="button" aria-pressed="false" data-level="{level}"><strong>{levels.count(level)}</strong>{level}</button>' for level in LEVELS)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figure(name: str, draw: Any, store: Sources, problems: list[str]) -> str:
    caption = " ".join(inspect.cleandoc(draw.__doc__).split())
    try:
        image = png(draw(store))
    except (ValueError, KeyError) as error:
        problems.append(f"figure {name}: {error}")
        return f'<figure class="plot"><figcaption>{html.escape(f"{name} could not be built: {error}")}</figcaption></figure>'
    return _image(image, caption)


def _image(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<figure class="plot"><img alt="{html.escape(caption)}" src="data:image/png;base64,{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _prose(markdown: str) -> str:
    """A page of `science`: headings, paragraphs and tables, which is all that it uses."""
    parts = []
    for block in markdown.strip().split("\n\n"):
        if heading := re.match(r"(#+) (.*)", block):
            level = len(heading[1]) + 1
            parts.append(f"<h{level}>{html.escape(heading[2])}</h{level}>")
        elif block.startswith("|"):
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f'<div class="wide"><table><thead><tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in head)}</tr></thead><tbody>{body}</tbody></table></div>')
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "".join(parts)


def _problems(problems: list[str]) -> str:
    return "<p>Could not be built or was left out:</p><ul>" + "".join(f"<li>{html.escape(problem)}</li>" for problem in problems) + "</ul>" if problems else ""


def _inert(text: str) -> str:
    """Text that cannot end the script element it stands in; JavaScript and JSON strings read the escapes alike."""
    return re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE).replace("<!--", r"\u003c!--")


if __name__ == "__main__":
    raise SystemExit(main())
