"""The views of the report's interactive scatter, as data and layouts of plotly.js."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.figures.style import Color, family_color, palette
from analysis.query import DIGITS_SCORE, ReferenceStore, rankable
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.declared.systems import SYSTEMS, family_of_system, size_of_system
from experiments.engine.records.store import Record
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import timing_stage

FID = "FID-50K, ImageNet 256, 400K steps (published)"
OURS = "ours"
GRID_COLOR = "#d5dbe1"
LABEL_PLACES = ("top center", "bottom center")
View = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A point of the scatter."""

    # Stands beside the mark.
    label: str
    x: float
    y: float
    # What a pointer over the mark shows, with <br> between its lines.
    hover: str
    # A click on the mark shows them.
    records: tuple[Record, ...] = ()
    # Of the mark, in pixels.
    size: float = 10
    # Ends of the error bar.
    low: float | None = None
    high: float | None = None


def views(store: ReferenceStore) -> list[View]:
    """Return the views.

    Published and own numbers never share a trace: open circles are the paper's, filled diamonds are
    ours and carry the names of their records.
    """
    rows = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000"]
    return [
        _view(
            "published: FID against throughput",
            "throughput, images/s on an A100 (published)",
            FID,
            _published_traces(rows, "throughput_img_s"),
        ),
        _view(
            "published: FID against Gflops",
            "Gflops (published)",
            FID,
            _published_traces(rows, "gflops"),
        ),
        _view(
            "FID (published) against Gflops by one rule (counted here)",
            "Gflops, core (counted here)",
            FID,
            _counted_traces(rows, _counts(store)),
        ),
        *(_digits_view(table, store) for table in (TABLE_3, TABLE_4)),
    ]


def _view(name: str, x: str, y: str, traces: list[View], log: bool = True) -> View:
    axis = dict(automargin=True, gridcolor=GRID_COLOR, zeroline=False)
    layout = dict(
        xaxis=axis | dict(title=dict(text=x), type="log" if log else "linear"),
        yaxis=axis | dict(title=dict(text=y)),
        margin=dict(l=60, r=10, t=10, b=50),
        hovermode="closest",
        legend=dict(orientation="h", y=1.12),
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    return dict(name=name, data=[trace for trace in traces if trace["x"]], layout=layout)


def _published_traces(rows: Sequence[dict[str, str]], column: str) -> list[View]:
    """Return a trace per family: published FID against a published cost."""
    traces = []
    for family, own in _by_family(rows).items():
        marks = [
            Mark(
                size_of_system(row["model"]),
                float(row[column]),
                float(row["fid"]),
                f"{row['model']}<br>FID {row['fid']}, {row['gflops']} Gflops, "
                f"{row['throughput_img_s'] or 'no'} img/s<br>{row['source']}",
                size=4 + 2 * float(row["gflops"]) ** 0.5,
            )
            for row in own
            if row[column]
        ]
        traces.append(_trace(family, marks, "circle-open", family_color(family)))
    return traces


def _counts(store: ReferenceStore) -> dict[str, tuple[Record, ...]]:
    """Return the counts of the systems at 256 pixels, of all networks of a system."""
    counts = {}
    for system in SYSTEMS:
        found = [store.reference.latest(cost) for cost in system.costs]
        records = tuple(record for record in found if record)
        if system.resolution == 256 and len(records) == len(found):
            counts[system.label] = records
    return counts


def _counted_traces(
    rows: Sequence[dict[str, str]], counts: dict[str, tuple[Record, ...]]
) -> list[View]:
    """Return a trace per family: published FID against Gflops counted here."""
    traces = []
    for family, own in _by_family(rows).items():
        marks = []

        # A model without a count here has no mark.
        for row in own:
            records = counts.get(row["model"], ())
            if not records:
                continue
            gflops = sum(record.values["macs_core"] for record in records) / 1e9
            hover = (
                f"{row['model']}<br>{gflops:.2f} Gflops counted here, {row['gflops']} published"
                f"<br>FID {row['fid']} ({row['source']})"
            )
            mark = Mark(size_of_system(row["model"]), gflops, float(row["fid"]), hover, records)
            marks.append(mark)
        traces.append(_trace(family, marks, "diamond", family_color(family)))
    return traces


def _by_family(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    families: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        families.setdefault(family_of_system(row["model"]), []).append(row)
    return families


def _digits_view(table: Table, store: ReferenceStore) -> View:
    """Return a table's rows on digits: held-out loss against throughput on a CPU."""
    marks = []
    digits = DIGITS_SCORE.digits
    scores, other = rankable(table.rows, DIGITS, store)
    for row, scored in zip(table.rows, scores, strict=True):
        timed = store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        if not timed or not scored:
            continue
        values = [record.values[DIGITS_SCORE.key] for record in scored]
        mean, speed = statistics.fmean(values), timed.values["relative"]
        seeds = ", ".join(f"{value:.{digits}f}" for value in values)
        hover = (
            f"{row.label}<br>{DIGITS_SCORE.name} {mean:.{digits}f}, seeds {seeds}"
            f"<br>{speed:.2f} x {table.baseline.label} on a CPU, fp32"
        )
        bar = dict(low=min(values), high=max(values))
        marks.append(Mark(row.label, speed, mean, hover, (timed, *scored), **bar))

    left_out = f" (left out, scored by another protocol: {', '.join(other)})" if other else ""
    return _view(
        f"ours: Table {table.number}'s rows on digits{left_out}",
        f"throughput relative to {table.baseline.label}, CPU, fp32 (ours)",
        f"{DIGITS_SCORE.name}, mean and range over seeds (ours)",
        [_trace(OURS, marks, "diamond", palette([OURS])[OURS])],
        log=False,
    )


def _trace(name: str, marks: Sequence[Mark], symbol: str, color: Color) -> View:
    """Return a trace; labels stand above and below their marks in turn, from left to right."""
    marks = sorted(marks, key=lambda mark: mark.x)
    red, green, blue = (round(255 * part) for part in color)

    # Each mark carries the names of its records, which the page shows at a click.
    trace = dict(
        type="scatter",
        mode="markers+text",
        name=name,
        x=[mark.x for mark in marks],
        y=[mark.y for mark in marks],
        text=[mark.label for mark in marks],
        textposition=[LABEL_PLACES[number % 2] for number in range(len(marks))],
        textfont=dict(size=10),
        hovertext=[_hover(mark) for mark in marks],
        hovertemplate="%{hovertext}<extra></extra>",
        customdata=[" ".join(record.name for record in mark.records) for mark in marks],
        marker=dict(
            symbol=symbol,
            color=f"rgb({red},{green},{blue})",
            size=[mark.size for mark in marks],
            line=dict(width=2),
        ),
    )

    # Only marks with an interval have error bars, so a trace has them for all marks or for none.
    bars = [(mark.y - mark.low, mark.high - mark.y) for mark in marks if mark.low and mark.high]
    if bars:
        below, above = zip(*bars, strict=True)
        trace["error_y"] = dict(type="data", array=above, arrayminus=below, thickness=1)
    return trace


def _hover(mark: Mark) -> str:
    """Return the text under the pointer, which tells how many records a click shows."""
    if not mark.records:
        return mark.hover
    plural = "s" if len(mark.records) > 1 else ""
    return f"{mark.hover}<br>click for {len(mark.records)} record{plural}"
