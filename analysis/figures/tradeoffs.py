"""Score against cost: rows on digits, their spread over seeds, and published fronts. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_points
from analysis.figures.style import (
    MARKS,
    OPEN,
    below,
    family_color,
    figure,
    note,
    palette,
    plain_log,
    system_color,
)
from analysis.query import DIGITS_SCORE, ReferenceStore, rankable, scores_of
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.declared.systems import SYSTEMS, family_of_system, size_of_system
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import timing_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUNDING = 1.0  # per cent, within which a count by one rule meets a published one
SCORES = f"{DIGITS_SCORE.name}, one dot per training seed"


def table3_score_speed(store: ReferenceStore) -> Figure:
    """Table 3's rows on digits: held-out loss (mean and range over training seeds, log scale)
    against throughput on a CPU in fp32, relative to DiT (iso.). The grey line is the Pareto front
    of the means."""
    return score_against_speed(TABLE_3, store)


def table4_score_speed(store: ReferenceStore) -> Figure:
    """Table 4's rows on digits: held-out loss (mean and range over training seeds) against
    throughput on a CPU in fp32, relative to DiCo-S. The grey line is the Pareto front of the means,
    whose order the seeds need not resolve."""
    return score_against_speed(TABLE_4, store)


def score_against_speed(table: Table, store: ReferenceStore) -> Figure:
    """Draw the held-out loss of a table's rows against throughput relative to the first row's."""
    drawing, axes = figure(7.6, 4.4)
    points: list[Point] = []
    untimed: list[str] = []
    scores, other = rankable(table.rows, DIGITS, store)
    colors = palette(row.label for row in table.rows)
    for index, (row, scored) in enumerate(zip(table.rows, scores, strict=True)):
        timed = store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        if row.label in other:
            continue
        if timed is None or not scored:
            untimed.append(row.label)
            continue

        # The mark stands at the mean, the bars show the range over seeds and the timing's spread.
        values = [record.values[DIGITS_SCORE.key] for record in scored]
        mean, low, high = statistics.fmean(values), min(values), max(values)
        speed, spread = timed.values["relative"], timed.values["relative_spread"]
        axes.errorbar(
            speed,
            mean,
            xerr=spread,
            yerr=[[mean - low], [high - mean]],
            fmt=MARKS[index % len(MARKS)],
            ms=5,
            capsize=2,
            elinewidth=0.8,
            color=colors[row.label],
            label=row.label,
        )
        bars = (((speed - spread, mean), (speed + spread, mean)), ((speed, low), (speed, high)))
        points.append(Point(row.label, speed, mean, colors[row.label], bars=bars))

    _draw_front(axes, [(point.x, point.y) for point in points])
    _label_score_axes(axes, table, store)
    label_points(axes, points, fontsize=7.5)
    remarks = _left_out(other)
    if untimed:
        remarks.append(f"no record: {', '.join(untimed)}")
    below(drawing, remarks)
    return drawing


def _label_score_axes(axes: Axes, table: Table, store: ReferenceStore) -> None:
    seeds = len(scores_of(table.baseline, DIGITS, store))
    axes.set_title(f"Table {table.number}'s rows on the digits protocol")
    axes.set_xlabel(
        f"throughput relative to {table.baseline.label}, CPU, 32x32x4, fp32, "
        "± half the interquartile range"
    )
    axes.set_ylabel(f"{DIGITS_SCORE.name}, mean and range of {seeds} seeds (lower is better)")
    axes.margins(x=0.1)
    if table is TABLE_3:
        plain_log(axes, "y")


def seed_spread(store: ReferenceStore) -> Figure:
    """Held-out loss of every training seed (dots) and their mean (bar), for the rows of Tables 3
    and 4 on digits. Rows that are one network in both tables share their records."""
    drawing, (left, right) = figure(8.2, 4.2, columns=2, width_ratios=(1, 1.25))
    remarks = _draw_seeds(left, TABLE_3, store) + _draw_seeds(right, TABLE_4, store)
    left.set_xlabel(f"{SCORES} (log scale)")
    right.set_xlabel(SCORES)
    plain_log(left, "x")
    below(drawing, remarks)
    return drawing


def _draw_seeds(axes: Axes, table: Table, store: ReferenceStore) -> list[str]:
    """Draw the scores of a table's rows; return remarks on rows of another protocol."""
    scores, other = rankable(table.rows, DIGITS, store)
    color = palette([SCORES])[SCORES]
    for place, scored in enumerate(reversed(scores)):
        values = [record.values[DIGITS_SCORE.key] for record in scored]
        axes.plot(values, [place] * len(values), "o", ms=4.5, color=color, alpha=0.8)
        if values:
            mean = statistics.fmean(values)
            axes.plot([mean, mean], [place - 0.3, place + 0.3], "-", color="black", lw=1.4)
    axes.set_yticks(range(len(table.rows)), [row.label for row in reversed(table.rows)])
    axes.set_title(f"Table {table.number}")
    return _left_out(other)


def _left_out(other: dict[str, list[str]]) -> list[str]:
    """Return a remark on rows whose scores are of another protocol than their table's first."""
    return [f"left out, scored by another protocol: {', '.join(other)}"] if other else []


@dataclass(frozen=True)
class _CostAxis:
    """A cost of systems, as one panel of the Pareto figure shows it."""

    label: str
    # By system.
    costs: dict[str, float]
    # Whether less of it is better.
    lower: bool
    # Whether it was counted here; else it is published.
    counted: bool = False


def pareto(store: ReferenceStore) -> Figure:
    """Pareto fronts of the published ImageNet 256 results after 400K steps (Table 1): FID against
    Gflops as the paper prints them, against Gflops counted here by one rule for all (filled), and
    against published throughput. The second panel names the systems whose count by one rule is
    further
    from the published one than its rounding."""
    drawing, panels = figure(10.4, 4.0, columns=3, sharey=True)
    rows = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000"]
    published = {row["model"]: float(row["gflops"]) for row in rows if row["gflops"]}
    rates = {
        row["model"]: float(row["throughput_img_s"]) for row in rows if row["throughput_img_s"]
    }
    core = _core_gflops(store)
    counted = {row["model"]: core[row["model"]] for row in rows if row["model"] in core}
    axes = (
        _CostAxis("Gflops (published)", published, lower=True),
        _CostAxis("Gflops, one rule for all (counted here)", counted, lower=True, counted=True),
        _CostAxis("images/s, A100 (published)", rates, lower=False),
    )
    scores = {row["model"]: float(row["fid"]) for row in rows}

    # The legend must stand before labels are placed, since it takes part in the layout.
    panels[0].set_ylabel("FID-50K, ImageNet 256, 400K steps (published)")
    for family in dict.fromkeys(family_of_system(name) for name in scores):
        panels[0].plot([], [], "o", color=family_color(family), label=family, **OPEN)
    panels[0].legend()
    for panel, axis in zip(panels, axes, strict=True):
        _draw_pareto(panel, axis, scores)
    _note_differences(panels[1], published, counted)
    return drawing


def _core_gflops(store: ReferenceStore) -> dict[str, float]:
    """Return the Gflops of the systems at 256 pixels, counted by one rule."""
    gflops = {}
    for system in SYSTEMS:
        records = [store.reference.latest(cost) for cost in system.costs]
        macs = [record.values["macs_core"] for record in records if record]
        if system.resolution == 256 and len(macs) == len(records):
            gflops[system.label] = sum(macs) / 1e9
    return gflops


def _draw_pareto(panel: Axes, axis: _CostAxis, scores: dict[str, float]) -> None:
    points = []

    # Filled marks are costs that we counted, and open ones are the paper's.
    for name, score in scores.items():
        if name not in axis.costs:
            continue
        color = system_color(name)
        if axis.counted:
            panel.plot(axis.costs[name], score, "D", ms=5, color=color)
        else:
            panel.plot(axis.costs[name], score, "o", ms=5, color=color, **OPEN)
        points.append(Point(size_of_system(name), axis.costs[name], score, color))

    # The front and the labels need the final scales of the axes.
    panel.set_xscale("log")
    panel.set_xlabel(axis.label)
    panel.margins(x=0.1, y=0.08)
    _draw_front(panel, [(point.x, point.y) for point in points], axis.lower)
    label_points(panel, points)


def _note_differences(panel: Axes, published: dict[str, float], counted: dict[str, float]) -> None:
    """Name the systems whose count differs from the published one by more than its rounding."""
    lines = []
    for name, gflops in counted.items():
        if name in published:
            percent = 100 * (gflops / published[name] - 1)
            if abs(percent) > ROUNDING:
                lines.append(f"{name} {percent:+.0f} %")
    if lines:
        note(panel, "\n".join(["counted, of published:", *lines]))


def front(points: Sequence[tuple[float, float]], lower: bool = False) -> list[tuple[float, float]]:
    """Return the points that no other point beats.

    A lower second coordinate is better, and a higher first one or, with `lower`, a lower one.
    """
    sign = -1 if lower else 1
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-sign * point[0], point[1])):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]], lower: bool = False) -> None:
    kept = front(points, lower)
    if kept:
        xs, ys = zip(*kept, strict=True)
        axes.plot(xs, ys, "-", color="0.6", lw=1, zorder=0)
