"""The map of the field: published FID against what one guided image costs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_points
from analysis.figures.style import OPEN, Color, below, figure, palette
from analysis.query import ReferenceStore, gpu_timings, numeric_mode
from experiments.declared.systems import IMAGES
from experiments.engine.reporting.efficiency.images import Drawn, published_scores, tera_macs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESOLUTION = 256
# Rows that a guided evaluation computes for one image.
GUIDED_ROWS = 2
KINDS = ("diffusion, SD's VAE", "diffusion, another autoencoder", "autoregressive")


@dataclass(frozen=True)
class Plotted:
    """A system with its published FID, in the colour of its kind."""

    system: Drawn
    score: float
    color: Color


def field_map(store: ReferenceStore) -> Figure:
    """Published FID of guided samples at 256 pixels against the cost of one image. Left, T MACs
    counted here by one rule: network evaluations times two rows times the network's
    multiply-accumulates, without the autoencoder. Right, seconds: open marks are the paper's
    throughput on an A100, of one evaluation, times evaluations and rows; filled marks are GPUs
    measured here, in fp32 without TF32. Published scores are of each paper's own recipe and length
    of training, so a point compares systems and not networks."""
    drawing, (counted, timed) = figure(10.4, 4.6, columns=2, width_ratios=(1.5, 1), sharey=True)
    scores = {model: float(fid) for model, fid in published_scores(store).items() if fid}
    colors = palette(KINDS)
    plotted = [
        Plotted(each, scores[each.label], colors[_kind(each)])
        for each in IMAGES
        if each.resolution == RESOLUTION and each.label in scores
    ]
    for kind, color in colors.items():
        counted.plot([], [], "D", color=color, label=kind)
    _draw_counted(counted, plotted, store)
    timings = _draw_seconds(timed, plotted, store)

    counted.set_ylabel("FID-50K, ImageNet 256, guided (published)")
    counted.set_xlabel("T MACs of one guided image (counted here)")
    timed.set_xlabel("seconds of one guided image")
    counted.legend(loc="upper left")
    remarks = [f"right: {timings} of {len(plotted)} systems were measured here on a GPU"]
    below(drawing, remarks)
    return drawing


def _kind(system: Drawn) -> str:
    if system.evaluations is None:
        return KINDS[2]
    return KINDS[0] if system.autoencoder == Drawn.autoencoder else KINDS[1]


def _draw_counted(axes: Axes, plotted: Sequence[Plotted], store: ReferenceStore) -> None:
    points = []
    for each in plotted:
        record = store.reference.latest(each.system.cost)
        cost = tera_macs(each.system, record, guided=True).value
        if cost is None:
            continue
        axes.plot(cost, each.score, "D", ms=5, color=each.color)
        points.append(Point(each.system.label, cost, each.score, each.color))
    axes.set_xscale("log")
    axes.margins(x=0.12)
    label_points(axes, points, fontsize=6.5)


def _draw_seconds(axes: Axes, plotted: Sequence[Plotted], store: ReferenceStore) -> int:
    """Draw seconds by the published throughput and by our GPU timings; return how many of ours."""
    published = {
        row["model"]: float(row["throughput_img_s"])
        for row in store.rows("table1.csv")
        if row["throughput_img_s"]
    }
    points, measured = [], 0
    for each in plotted:
        system = each.system
        if system.evaluations is None:
            continue
        passes = GUIDED_ROWS * system.evaluations
        if system.label in published:
            seconds = passes / published[system.label]
            axes.plot(seconds, each.score, "o", ms=5, color=each.color, **OPEN)
            points.append(Point(system.label, seconds, each.score, each.color))
        timings = [
            record
            for record in gpu_timings(system.cost.backbone, system.cost.size, store)
            if numeric_mode(record) == "fp32, TF32 off"
        ]
        if timings:
            measured += 1
            seconds = passes / timings[-1].values["images_per_s"]
            axes.plot(seconds, each.score, "o", ms=5, color=each.color)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    label_points(axes, points, fontsize=6.5)
    return measured
