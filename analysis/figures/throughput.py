"""Figure 2 of the paper: score against throughput. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_points
from analysis.figures.style import (
    MARKS,
    below,
    errors,
    family_color,
    figure,
    system_color,
)
from analysis.query import ReferenceStore, at_one_batch, gpu_timings, rankable
from experiments.declared.protocols import IMAGENET256
from experiments.declared.systems import family_of_system, size_of_system
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import mean_cell
from experiments.engine.specs.stages import cost_stages
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AREA = 6  # of a bubble, in square points per Gflop
STEPS = "400000"  # of the trainings that are compared


def fid_against_throughput(store: ReferenceStore) -> Figure:
    """Figure 2: FID-50K against inference throughput on ImageNet 256, after 400K steps without
    guidance. Open bubbles are published (Table 1, on an A100); their area is the Gflops. Filled
    bubbles are ours: networks with a score and a GPU timing here, in each numeric mode at the one
    batch at which most of them were timed, with Gflops counted here and the errors of both axes.
    The
    figure of numeric modes shows in which modes the published throughput can have been measured."""
    drawing, axes = figure(6.6, 4.4)
    published = [row for row in store.rows("table1.csv") if row["train_steps"] == STEPS]
    points = _draw_published(axes, published)
    ours = _draw_ours(axes, store)

    remarks = [ours]
    untimed = [row["model"] for row in published if not row["throughput_img_s"]]
    if untimed:
        remarks.insert(0, f"no published throughput: {', '.join(untimed)}")
    below(drawing, remarks)

    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_xlabel("throughput, images/s (published: on an A100; log scale)")
    axes.set_ylabel("FID-50K, ImageNet 256, 400K steps (lower is better)")
    axes.legend(title="area: Gflops", markerscale=0.5, loc="upper left")
    label_points(axes, points, fontsize=7.5)
    return drawing


def _draw_published(axes: Axes, published: list[dict[str, str]]) -> list[Point]:
    """Draw a line of bubbles per family; return the bubbles with the sizes that label them."""
    timed = [row for row in published if row["throughput_img_s"]]
    points = []
    for family in dict.fromkeys(family_of_system(row["model"]) for row in timed):
        rows = [row for row in timed if family_of_system(row["model"]) == family]
        rates = [float(row["throughput_img_s"]) for row in rows]
        scores = [float(row["fid"]) for row in rows]
        areas = [AREA * float(row["gflops"]) for row in rows]

        color = family_color(family)
        axes.plot(rates, scores, "-", lw=1, color=color)
        fill = (*color, 0.15)
        axes.scatter(rates, scores, s=areas, ec=color, fc=fill, lw=1.4, label=family, zorder=3)

        for row, rate, score, area in zip(rows, rates, scores, areas, strict=True):
            size = size_of_system(row["model"])
            points.append(Point(size, rate, score, color, radius=area**0.5 / 2))
    return points


@dataclass(frozen=True)
class _Ours:
    """Our networks of Figure 2."""

    # How many networks there are.
    total: int
    # Scores by network, all of one protocol.
    scores: dict[str, list[Record]]
    # GPU timings by network, in any numeric mode.
    timings: dict[str, list[Record]]
    # Networks whose scores are of another protocol.
    other: list[str]


def _our_records(store: ReferenceStore) -> _Ours:
    table = TABLES[1]
    published = store.published(table.published, table.key)
    rows = [
        row
        for row in table.rows
        if row.backbone and row.published and published[row.published]["train_steps"] == STEPS
    ]

    # Throughput needs no training, so even a row without scores has its timings.
    scores, other = rankable(rows, IMAGENET256, store)
    timings = {
        row.label: gpu_timings(row.backbone, cost_stages(row)[0].size, store)
        for row in rows
        if row.backbone
    }

    return _Ours(
        len(rows),
        {row.label: records for row, records in zip(rows, scores, strict=True) if records},
        timings,
        list(other),
    )


def _draw_ours(axes: Axes, store: ReferenceStore) -> str:
    """Draw our networks that have a score and a timing; say how many have what."""
    ours = _our_records(store)
    scored = {label: ours.timings[label] for label in ours.scores}
    drawn = set()
    for index, (setting, timed) in enumerate(sorted(at_one_batch(scored).items())):
        mode, device, batch = setting
        label: str | None = f"ours: {mode}, {device}, batch {batch}"
        for name, timing in timed.items():
            counts = [store.reference.latest(cost) for cost in cost_stages(TABLES[1].row(name))]
            macs = [count.values["macs_torchprofile"] for count in counts if count]
            if len(macs) < len(counts):
                continue

            rate = timing.values["images_per_s"]
            score = mean_cell("fid", [record.values for record in ours.scores[name]])
            assert score.value is not None, name
            color = system_color(name)
            axes.scatter(
                rate,
                score.value,
                s=AREA * sum(macs) / 1e9,
                color=color,
                marker=MARKS[index % len(MARKS)],
                alpha=0.5,
                lw=0,
                zorder=4,
                label=label,
            )
            spread = [timing.values.get("images_per_s_spread")]
            errors(axes, [rate], [score.value], color, xerr=spread, yerr=[score.error])
            drawn.add(name)
            label = None  # the legend names a setting once

    timed_here = sum(bool(records) for records in ours.timings.values())
    remark = (
        f"ours: of {ours.total} networks {len(ours.scores)} have a score, "
        f"{timed_here} a GPU timing, {len(drawn)} both"
    )
    if ours.other:
        remark += f"; left out, scored by another protocol: {', '.join(ours.other)}"
    return remark
