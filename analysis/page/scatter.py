"""What the report's interactive scatter can show, as plotly.js data and layouts. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from analysis.query import ReferenceStore, rankable
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.declared.systems import SYSTEMS
from experiments.engine.records.store import Record
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import timing_stage

COLOURS = {"DiT": "#0173b2", "DiCo": "#de8f05", "DiG": "#029e73", "DiC": "#d55e00"}
FID = "FID-50K, ImageNet 256, 400K steps (published)"


def views(store: ReferenceStore) -> list[dict[str, Any]]:
    """Published and own numbers never share a trace: open circles are the paper's, filled diamonds are ours and carry the names of
    their records."""
    rows = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000"]
    counts = {}
    for system in SYSTEMS:
        records = [store.reference.latest(cost) for cost in system.costs]
        if system.resolution == 256 and all(records):
            counts[system.label] = records
    return [
        _view(
            "published: FID against throughput",
            "throughput, images/s on an A100 (published)",
            FID,
            _published(rows, "throughput_img_s"),
        ),
        _view(
            "published: FID against Gflops", "Gflops (published)", FID, _published(rows, "gflops")
        ),
        _view(
            "FID (published) against Gflops by one rule (counted here)",
            "Gflops, core (counted here)",
            FID,
            _counted(rows, counts),
        ),
        *(_digits(table, store) for table in (TABLE_3, TABLE_4)),
    ]


def _view(
    name: str, x: str, y: str, data: list[dict[str, Any]], log: bool = True
) -> dict[str, Any]:
    axis = dict(automargin=True, gridcolor="#d5dbe1", zeroline=False)
    layout = dict(
        xaxis=axis | dict(title=dict(text=x), type="log" if log else "linear"), yaxis=axis | dict(title=dict(text=y)), margin=dict(l=60, r=10, t=10, b=50),
        hovermode="closest", legend=dict(orientation="h", y=1.12), paper_bgcolor="white", plot_bgcolor="white",
    )  # fmt: skip
    return dict(name=name, data=data, layout=layout)


def _published(rows: Sequence[dict[str, str]], column: str) -> list[dict[str, Any]]:
    data = []
    for family, colour in COLOURS.items():
        own = [row for row in rows if row["model"].partition("-")[0] == family and row[column]]
        words = [
            f"{row['model']}<br>FID {row['fid']}, {row['gflops']} Gflops, {row['throughput_img_s'] or 'no'} img/s<br>{row['source']}"
            for row in own
        ]
        sizes = [4 + 2 * float(row["gflops"]) ** 0.5 for row in own]
        data.append(
            _trace(
                family,
                [float(row[column]) for row in own],
                [float(row["fid"]) for row in own],
                words,
                "circle-open",
                colour,
                sizes,
            )
        )
    return [trace for trace in data if trace["x"]]


def _counted(
    rows: Sequence[dict[str, str]], counts: dict[str, list[Record]]
) -> list[dict[str, Any]]:
    data = []
    for family, colour in COLOURS.items():
        own = [
            row
            for row in rows
            if row["model"].partition("-")[0] == family and row["model"] in counts
        ]
        found = [counts[row["model"]] for row in own]
        core = [sum(record.values["macs_core"] for record in records) / 1e9 for records in found]
        words = [
            f"{row['model']}<br>{gflops:.2f} Gflops counted here, {row['gflops']} published<br>FID {row['fid']} ({row['source']})"
            for row, gflops in zip(own, core, strict=True)
        ]
        data.append(
            _trace(
                family,
                core,
                [float(row["fid"]) for row in own],
                words,
                "diamond",
                colour,
                10,
                found,
            )
        )
    return [trace for trace in data if trace["x"]]


def _digits(table: Table, store: ReferenceStore) -> dict[str, Any]:
    x, y, low, high, words, found = [], [], [], [], [], []
    scores, other = rankable(table.rows, DIGITS, store)
    for row, scored in zip(table.rows, scores, strict=True):
        timed = store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        if timed and scored:
            values = [record.values["fd_digits"] for record in scored]
            found.append([timed, *scored])
            mean = statistics.fmean(values)
            x.append(timed.values["relative"])
            y.append(mean)
            low.append(mean - min(values))
            high.append(max(values) - mean)
            words.append(
                f"{row.label}<br>fd_digits {mean:.1f}, seeds {', '.join(f'{score:.1f}' for score in values)}<br>{timed.values['relative']:.2f} x {table.baseline.label} on a CPU, fp32"
            )
    trace = _trace("ours", x, y, words, "diamond", "#0173b2", 10, found) | dict(
        error_y=dict(type="data", array=high, arrayminus=low, thickness=1)
    )
    left_out = f" (left out, scored by another protocol: {', '.join(other)})" if other else ""
    return _view(
        f"ours: Table {table.number}'s rows on digits{left_out}",
        f"throughput relative to {table.baseline.label}, CPU, fp32 (ours)",
        "fd_digits, mean and range over seeds (ours)",
        [trace],
        log=False,
    )


def _trace(
    name: str,
    x: list[float],
    y: list[float],
    words: list[str],
    symbol: str,
    colour: str,
    size: Any,
    records: Sequence[Sequence[Record]] = (),
) -> dict[str, Any]:
    """`records` are those of each point, which a click on it shows."""
    clicked = [f"<br>click for {len(own)} record{'s' * (len(own) > 1)}" for own in records] or [
        ""
    ] * len(words)
    return dict(
        type="scatter", mode="markers", name=name, x=x, y=y, text=[text + more for text, more in zip(words, clicked, strict=True)],
        hovertemplate="%{text}<extra></extra>", customdata=[" ".join(record.name for record in own) for own in records],
        marker=dict(symbol=symbol, color=colour, size=size, line=dict(width=2)),
    )  # fmt: skip
