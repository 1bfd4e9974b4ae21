"""In which numeric mode the published throughput can have been measured. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.figures.style import Style, figure, mark_gap, palette, system_color
from analysis.query import ReferenceStore, at_one_batch, gpu_timings, runtime_of
from experiments.declared.systems import SYSTEMS
from experiments.engine.records.store import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

A100_FP32 = 19.5  # TFLOP/s without tensor cores (NVIDIA A100 data sheet)
PAIR = ("DiCo-XL", "DiT-XL/2")
OURS = "ours"


def numeric_modes(store: ReferenceStore) -> Figure:
    """Does the speed-up depend on the numeric mode? Left: the arithmetic rate that a published
    throughput implies, at two operations per published multiply-accumulate, and an A100's peak in
    fp32 without tensor cores. A rate well above the line cannot be fp32. Right, ours: the speed-up
    of DiCo-XL over DiT-XL/2 in every numeric mode in which both were timed at one batch on a GPU
    here,
    with the spread of both."""
    drawing, (left, right) = figure(9.0, 4.2, columns=2, width_ratios=(1.7, 1))
    _draw_implied_rates(left, store)
    _draw_speed_ups(right, store)
    return drawing


def _draw_implied_rates(axes: Axes, store: ReferenceStore) -> None:
    # Bars are drawn upwards, so that Table 1's first row comes out on top.
    for resolution, table in ((512, "table2.csv"), (256, "table1.csv")):
        rates = {
            row["model"]: 2e-3 * float(row["throughput_img_s"]) * float(row["gflops"])
            for row in reversed(store.rows(table))
            if row["throughput_img_s"] and row["gflops"]
        }
        for model, rate in rates.items():
            color = system_color(model)
            label = f"{model} at {resolution}"
            axes.barh(label, rate, color=(*color, 0.25), ec=color, lw=1.2)

    # The line's name stands above the panel, where no bar is.
    axes.axvline(A100_FP32, color="black", lw=1.2, ls="--")
    above: Style = dict(xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7.5)
    axes.annotate("A100 peak in fp32", (A100_FP32, 1.01), **above)
    axes.set_xlabel("implied TFLOP/s (published throughput x 2 x published MACs)")
    axes.tick_params(axis="y", labelsize=6.5)


def _draw_speed_ups(axes: Axes, store: ReferenceStore) -> None:
    axes.set_xlabel("speed-up over DiT-XL/2 (ours)")
    drawn = 0
    for resolution in (256, 512):
        timings = {
            system.label: gpu_timings(system.costs[0].backbone, system.costs[0].size, store)
            for system in SYSTEMS
            if system.label in PAIR and system.resolution == resolution
        }

        # A ratio needs both networks on one device, in one mode, at one batch.
        for (mode, device, batch), timed in sorted(at_one_batch(timings).items()):
            if len(timed) < len(PAIR):
                continue
            ratio, error = _speed_up(timed)
            axes.barh(
                f"{mode}\n{device}, {resolution}, batch {batch}",
                ratio,
                xerr=error,
                color=palette([OURS])[OURS],
                error_kw=dict(elinewidth=0.8),
            )
            drawn += 1

    if not drawn:
        mark_gap(axes, "gap: no GPU timing\nis committed here")


def _speed_up(timed: dict[str, Record]) -> tuple[float, float]:
    """Return the speed-up of the pair's first network over its second, and its error."""
    time, time_error = runtime_of(timed[PAIR[0]])
    baseline, baseline_error = runtime_of(timed[PAIR[1]])
    ratio = baseline / time
    return ratio, ratio * math.hypot(time_error / time, baseline_error / baseline)
