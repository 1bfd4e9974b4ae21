"""The page's Jinja templates, and the libraries that the page embeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from analysis.page.content import Image, Table, names_of
from experiments.engine.reporting.sheet import Cell, Column, Kind

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Libraries:
    """Sources that the page embeds, so that it needs no network."""

    plotly: str
    datatables: str
    datatables_style: str


def load_libraries() -> Libraries:
    """Read plotly.js and DataTables from the packages that ship them.

    Raises:
        ValueError: if a package of the extra `report` is missing.
    """
    try:
        import jinja2  # noqa: F401

        bundle = files("itables") / "html"
        return Libraries(
            (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
            (bundle / "dt_bundle.js").read_text(encoding="utf-8"),
            (bundle / "dt_bundle.css").read_text(encoding="utf-8"),
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"the page needs Jinja, plotly.js and DataTables, and {error}; pip install -e .[report]"
        ) from None


def render_template(name: str, **values: Any) -> str:
    """Fill in a template; everything is escaped unless it is marked as safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["names"] = names_of
    environment.filters["inert"] = lambda text: Markup(inert(text))
    environment.filters["sort_value"] = sort_value
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["image"] = lambda block: isinstance(block, Image)
    environment.tests["prose"] = is_prose
    environment.globals["asset"] = read_asset
    return environment.get_template(name).render(**values)


def read_asset(name: str) -> Any:
    """Return a style sheet or a script of this project, to be embedded as it is."""
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def inert(text: str) -> str:
    """Return text that cannot end the script element around it.

    JavaScript and JSON strings read the escapes alike.
    """
    closed = re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE)
    return closed.replace("<!--", r"\u003c!--")


def is_prose(column: Column) -> bool:
    """Return whether a column is text, which is aligned to the left and wrapped."""
    return column.kind is Kind.PROSE


def sort_value(cell: Cell) -> str | None:
    """Return what a cell is sorted by: its value in full precision, or None for its label."""
    if cell.value is not None:
        return repr(cell.value)
    return None if cell.label else ""
