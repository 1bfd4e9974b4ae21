"""Figure 3 of the paper: runtime of a forward pass. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_points
from analysis.figures.style import (
    MARKS,
    OPEN,
    Style,
    below,
    errors,
    family_color,
    figure,
    mark_gap,
    system_color,
)
from analysis.query import ReferenceStore, at_one_batch, gpu_timings, numeric_mode, runtime_of
from experiments.declared.families import TITLES, family_of, size_of
from experiments.declared.systems import SYSTEMS
from experiments.declared.timings import figure_3
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.speed import unfused
from experiments.engine.specs.spec import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALES = ("S", "B", "L", "XL", "H")
LATENT_512 = 64  # side of the latents of 512 pixels


def runtime(store: ReferenceStore) -> Figure:
    """Figure 3, as far as it is printed in numbers. Left: runtime of one forward pass per image on
    ImageNet 512 (Table 2, A100, batch 64). Middle: FID with guidance against it. Right, ours:
    runtime over model sizes, for which the paper prints no numbers. Each network is timed alone at
    one batch, on a GPU if any timing on a GPU is committed, else on a CPU, which says nothing about
    a GPU. Bars
    are half the interquartile range."""
    drawing, (left, middle, right) = figure(11.2, 3.7, columns=3, width_ratios=(1, 1.15, 0.9))
    rows = {row["model"]: row for row in store.rows("table2.csv") if row["throughput_img_s"]}
    if not rows:
        raise ValueError("published data table2.csv: no row has a throughput")

    slowest_first = sorted(rows, key=lambda name: _published_time(rows[name]), reverse=True)
    _draw_published_times(left, {name: _published_time(rows[name]) for name in slowest_first})
    remarks = _draw_own_times(left, store, set(rows))
    remarks += _draw_own_sizes(right, store)
    below(drawing, remarks)

    guided = [
        row for row in store.rows("table2.csv") if row["throughput_img_s"] and row["cfg"] != "no"
    ]
    _draw_guided_scores(middle, {row["model"]: row for row in guided})
    return drawing


def _published_time(row: dict[str, str]) -> float:
    """Return the milliseconds per image of a published throughput."""
    return 1000 / float(row["throughput_img_s"])


def _draw_published_times(axes: Axes, times: dict[str, float]) -> None:
    edges = [system_color(name) for name in times]
    fills = [(*edge, 0.25) for edge in edges]
    axes.barh(list(times), list(times.values()), color=fills, ec=edges, lw=1.4)
    beside: Style = dict(xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    for name, time in times.items():
        axes.annotate(f"{time:.0f}", (time, name), **beside)
    axes.set_xlabel("ms per image and step, A100 (published)")
    axes.set_xlim(right=1.15 * max(times.values()))


def _draw_guided_scores(axes: Axes, rows: dict[str, dict[str, str]]) -> None:
    points = []
    for name, row in rows.items():
        time, score, color = _published_time(row), float(row["fid"]), system_color(name)
        axes.plot(time, score, "o", color=color, **OPEN)
        points.append(Point(name, time, score, color))
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.1)
    axes.set_xlabel("ms per image and step, A100 (published, log scale)")
    axes.set_ylabel("FID-50K, ImageNet 512 (DiT, DiCo: guided)")
    label_points(axes, points, fontsize=7.5)


def _draw_own_times(axes: Axes, store: ReferenceStore, names: set[str]) -> list[str]:
    """Draw our timings at 512 pixels, a mark for every numeric mode and device, each at one batch.

    Return remarks on networks that were not timed at that batch, or ran without a fused kernel.
    """
    timings = {
        system.label: gpu_timings(system.costs[0].backbone, system.costs[0].size, store)
        for system in SYSTEMS
        if system.resolution == 512 and system.label in names
    }
    timings = {name: records for name, records in timings.items() if records}
    if not timings:
        return ["left: no GPU timing is committed here"]

    remarks: dict[str, list[str]] = {}
    for index, (setting, timed) in enumerate(sorted(at_one_batch(timings).items())):
        mode, device, batch = setting
        times, spreads = zip(*(runtime_of(record) for record in timed.values()), strict=True)
        mark = MARKS[index % len(MARKS)]
        label = f"{mode}, {device}, batch {batch}"
        axes.plot(times, list(timed), mark, color="black", ms=4, label=label)
        errors(axes, times, list(timed), "black", xerr=spreads)

        for name, records in timings.items():
            if name in timed:
                for reason in unfused(timed[name]):
                    key = f"{reason}, without a fused kernel"
                    remarks.setdefault(key, []).append(f"{name} ({mode})")
            elif any(_setting_of(record) == (mode, device) for record in records):
                remarks.setdefault(f"not timed at batch {batch}", []).append(f"{name} ({mode})")

    axes.legend(title="measured here", fontsize=6)
    return _sentences(remarks)


def _setting_of(record: Record) -> tuple[str, str]:
    return numeric_mode(record), record.provenance["device"]


def _draw_own_sizes(axes: Axes, store: ReferenceStore) -> list[str]:
    """Draw our runtimes over model sizes in the numeric mode in which most networks were timed.

    Return remarks on networks that ran without a fused kernel.
    """
    axes.set_ylabel("ms per image and step, ImageNet 512 (ours)")
    device, timed = _timed_sizes(store)
    if not timed:
        mark_gap(axes, "no timing over model sizes\nis committed here")
        return []
    modes = [stage.precision for stage, _ in timed]
    mode = max(dict.fromkeys(modes), key=modes.count)
    kept = [
        (*_family_and_size(stage), record) for stage, record in timed if stage.precision == mode
    ]

    # A line per family; the empty line fixes the order of the sizes, whichever were timed.
    axes.plot(SCALES, [math.nan] * len(SCALES))
    for index, family in enumerate(dict.fromkeys(family for family, _, _ in kept)):
        times = {size: runtime_of(record) for label, size, record in kept if label == family}
        milliseconds = [time for time, _ in times.values()]
        spreads = [spread for _, spread in times.values()]
        color = family_color(family)
        axes.plot(list(times), milliseconds, f"-{MARKS[index]}", ms=5, color=color, label=family)
        errors(axes, list(times), milliseconds, color, yerr=spreads)

    record = kept[0][2]
    where = record.provenance["device" if device == "cuda" else "cpu"]
    axes.set_xlabel(f"model size ({mode}, {where}, batch {record.spec['batch']})")
    axes.set_yscale("log")
    axes.legend()

    remarks: dict[str, list[str]] = {}
    for family, size, record in kept:
        for reason in unfused(record):
            key = f"right: {reason}, without a fused kernel"
            remarks.setdefault(key, []).append(f"{family}-{size}")
    return _sentences(remarks)


def _timed_sizes(store: ReferenceStore) -> tuple[str, list[tuple[Timing, Record]]]:
    """Return the device, a GPU if anything was timed on one, and the timings on it."""
    timed: list[tuple[Timing, Record]] = []
    for device in ("cuda", "cpu"):
        for stage in figure_3(device):
            record = store.reference.latest(stage)
            if record and stage.size == LATENT_512:
                timed.append((stage, record))
        if timed:
            return device, timed
    return "cpu", []


def _family_and_size(stage: Timing) -> tuple[str, str]:
    """Return the family and the size of a backbone such as dit_s_2."""
    name = stage.backbone.name
    return TITLES[family_of(name)], size_of(name).upper()


def _sentences(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{remark}: {', '.join(names)}" for remark, names in remarks.items()]
