"""Parts of the report page as HTML: tables, figures, text and the names of the records behind each."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.claims.finding import LEVELS
from analysis.query import ReferenceStore
from analysis.tables.pages import Block, Origins, Text
from experiments.engine.records.store import Record
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Sheet

BROAD = 860  # pixels of width from which a figure takes the whole page


def table(sheet: Sheet, name: str = "", records: Iterable[Record] = ()) -> str:
    """A sheet as a table in a frame that scrolls sideways; its title leads to all records that it was made from."""
    made = (
        render([sheet], "html")
        .replace("<table>", f'<div class="wide"><table{f" id={name}" if name else ""}>')
        .replace("</table>", "</table></div>")
    )
    made = re.sub(r"<thead><tr>(<th colspan=\"\d+\"></th>)</tr>", "<thead>", made)
    made = made.replace("<figcaption></figcaption>\n", "").replace("<ul></ul>\n", "")
    return made.replace("<figcaption>", f"<figcaption{named(records)}>", 1)


def tiles(claims: Sheet) -> str:
    """A button for each level of evidence, with the number of its claims."""
    levels = [cell.label for cell in claims.values("evidence")] if claims.has("evidence") else []
    made = (
        f'<button type="button" aria-pressed="false" data-level="{level}"><strong>{levels.count(level)}</strong>{level}</button>'
        for level in LEVELS
    )
    return f'<div class="tiles">{"".join(made)}</div>'


def named(records: Iterable[Record]) -> str:
    """The attribute by which the page's script finds records; '' for none."""
    names = " ".join(record.name for record in records)
    return f' data-records="{names}"' if names else ""


def figure(png: bytes, caption: str, records: Iterable[Record] = (), kind: str = "plot") -> str:
    """An image with its caption, which leads to the records."""
    from PIL import Image

    width = Image.open(io.BytesIO(png)).width
    source, words = base64.b64encode(png).decode(), html.escape(caption)
    shown = f'<div class="frame"><img alt="{words}" width="{width}" src="data:image/png;base64,{source}"></div>'
    return f'<figure class="{kind}{" broad" if width >= BROAD else ""}">{shown}<figcaption{named(records)}>{words}</figcaption></figure>'


def lacking(caption: str) -> str:
    """Where a figure could not be drawn."""
    return f'<figure class="plot"><figcaption>{html.escape(caption)}</figcaption></figure>'


def grids(folder: Path, store: ReferenceStore, problems: list[str]) -> str:
    """The sample grids in a folder, each with what its file says of its run; a sentence where there are none. Damaged files become problems."""
    from PIL import Image

    from analysis.grid import CAPTION, RECORDS

    committed = {record.name: record for record in store.all_records()}
    made = []
    for path in sorted(folder.glob("*.png")):
        try:
            about = Image.open(path).info
        except OSError:
            problems.append(
                f"samples: {path.name} is no image; draw it again with python -m analysis.grid"
            )
            continue
        caption = about.get(CAPTION) or f"{path.name}: its file does not say of which run"
        made.append(
            figure(
                path.read_bytes(),
                caption,
                [committed[name] for name in about.get(RECORDS, "").split() if name in committed],
                "plot samples",
            )
        )
    if not made:
        return "<p>No grid of samples is committed: <code>python -m analysis.grid</code> draws one of any run that finished on a machine.</p>"
    return f'<div class="grid small">{"".join(made)}</div>'


def prose(blocks: Sequence[Block]) -> str:
    """A page of `science`; the lists of records are left to Markdown, since cells and paragraphs lead to theirs here."""
    parts = []
    for block in blocks:
        if isinstance(block, Text):
            tag = f"h{block.level + 1}" if block.level else "p"
            parts.append(f"<{tag}{named(block.records)}>{html.escape(block.words)}</{tag}>")
        elif not isinstance(block, Origins):
            parts.append(table(block))
    return "".join(parts)


def problem_list(problems: Sequence[str]) -> str:
    return (
        "<p>Could not be built or was left out:</p><ul>"
        + "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        + "</ul>"
        if problems
        else ""
    )


def record_data(store: ReferenceStore) -> str:
    """Every committed record by name, as JSON, with the file that it is."""
    return json.dumps(
        {
            record.name: vars(record) | {"file": store.file_of(record)}
            for record in store.all_records()
        },
        sort_keys=True,
    )


def inert(text: str) -> str:
    """Text that cannot end the script element it stands in; JavaScript and JSON strings read the escapes alike."""
    return re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE).replace("<!--", r"\u003c!--")
