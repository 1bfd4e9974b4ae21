"""Figures 2, 3, 8 and 9 of the paper from published numbers, in 3 and 9 ours beside them where a record exists. No torch.

The docstring of a figure is its caption. Open marks are the paper's, filled marks are this project's records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.query import Sources, gpu_timings, numeric_mode
from analysis.style import MARKS, PUBLISHED, SIZES, colour, family_colour, figure, note
from experiments.ablation import TABLE_4
from experiments.protocols import DIGITS, train_stage
from experiments.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fid_against_throughput(store: Sources) -> Figure:
    """Figure 2: FID-50K on ImageNet 256 after 400K steps without guidance against inference throughput on an A100, as published
    (Table 1); the bubble's area is the Gflops. DiC is left out: the paper prints no throughput of it. Published throughput mixes
    numeric modes (convolutions in TF32, linear layers in fp32)."""
    made, axes = figure(6.6, 4.4)
    rows = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000" and row["throughput_img_s"]]
    for place, family in enumerate(dict.fromkeys(row["model"].partition("-")[0] for row in rows)):
        own = [row for row in rows if row["model"].partition("-")[0] == family]
        x, y = ([float(row[name]) for row in own] for name in ("throughput_img_s", "fid"))
        axes.plot(x, y, "-", lw=1, color=family_colour(family))
        areas = [6 * float(row["gflops"]) for row in own]
        axes.scatter(x, y, s=areas, ec=family_colour(family), fc=(*family_colour(family), 0.15), lw=1.4, label=family, zorder=3)
        side = -1 if place % 2 else 1  # neighbouring families' names on opposite sides
        for row, left, up, area in zip(own, x, y, areas, strict=True):
            away = (side * (area**0.5 / 2 + 3), 0)
            axes.annotate(row["model"].split("-")[1].removesuffix("/2"), (left, up), xytext=away, textcoords="offset points", fontsize=7.5, ha="left" if side > 0 else "right", va="center", color=family_colour(family))
    timed = sum(bool(gpu_timings(system.costs[0].backbone, system.costs[0].size, store)) for system in SYSTEMS if system.resolution == 256)
    note(axes, "published only: no GPU timing is committed here" if not timed else f"published; our {timed} GPU timings have no FID beside them", bottom=True)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_xlabel("throughput, images/s on an A100 (published, log scale)")
    axes.set_ylabel("FID-50K, ImageNet 256, 400K steps (lower is better)")
    axes.legend(title="area: Gflops", markerscale=0.5, loc="upper left")
    return made


def runtime(store: Sources) -> Figure:
    """Figure 3 as far as it was printed in numbers: runtime of one forward pass an image on ImageNet 512 (Table 2, A100, batch 64) and
    FID with guidance against it. The paper's panel over model sizes has no numbers in print, so the small sizes are a gap."""
    made, (left, right) = figure(8.2, 3.6, columns=2, width_ratios=(1, 1.15))
    rows = {row["model"]: row for row in store.rows("table2.csv") if row["throughput_img_s"]}
    times = sorted(((1000 / float(row["throughput_img_s"]), name) for name, row in rows.items()), reverse=True)
    left.barh([name for _, name in times], [time for time, _ in times], color=[(*family_colour(name), 0.25) for _, name in times], ec=[family_colour(name) for _, name in times], lw=1.4)
    for time, name in times:
        left.annotate(f"{time:.0f}", (time, name), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    left.set_xlabel("ms an image and step, A100 (published)")
    left.set_xlim(right=1.15 * times[0][0])
    guided = {row["model"]: row for row in store.rows("table2.csv") if row["throughput_img_s"] and row["cfg"] != "no"}
    for name, row in guided.items():
        time, fid = 1000 / float(row["throughput_img_s"]), float(row["fid"])
        right.plot(time, fid, "o", color=family_colour(name), **PUBLISHED)
        right.annotate(name, (time, fid), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
    _own_runtimes(left, store, {name for _, name in times})
    right.set_xscale("log")
    right.set_xlim(right=2.5 * times[0][0])
    right.margins(y=0.1)
    right.set_xlabel("ms an image and step, A100 (published, log scale)")
    right.set_ylabel("FID-50K, ImageNet 512 (DiT, DiCo: with guidance)")
    return made


def _own_runtimes(axes: Axes, store: Sources, names: set[str]) -> None:
    marks: dict[str, str] = {}
    for system in SYSTEMS:
        if system.resolution == 512 and system.label in names:
            for record in gpu_timings(system.costs[0].backbone, system.costs[0].size, store):
                mode = f"{numeric_mode(record)}, {record.provenance['device']}"
                mark = marks.setdefault(mode, MARKS[len(marks) % len(MARKS)])
                axes.plot(1000 / record.values["images_per_s"], system.label, mark, color="black", ms=4, label=None if mode in axes.get_legend_handles_labels()[1] else mode)
    if marks:
        axes.legend(title="measured here")
    else:
        note(axes, "no GPU timing\nis committed here")


def scores_over_training(store: Sources) -> Figure:
    """Figure 8 and Table 7: scores of 50K images over training on ImageNet 256 without guidance, as published. Published only:
    ours stand in Table 7."""
    made, axes = figure(8.2, 4.6, 2, 3)
    rows = store.rows("table7.csv")
    panels = {"fid": "FID (lower is better)", "sfid": "sFID (lower is better)", "is": "IS (higher is better)", "precision": "precision", "recall": "recall"}
    for panel, (name, label) in zip(axes.flat, panels.items(), strict=False):
        for index, model in enumerate(SIZES):
            own = [row for row in rows if row["model"] == model]
            panel.plot([int(row["train_steps"]) / 1000 for row in own], [float(row[name]) for row in own], f"-{MARKS[index]}", ms=4, color=colour(index), label=model, **PUBLISHED)
        panel.set_title(label)
    for panel in axes[1]:
        panel.set_xlabel("training steps, thousands")
    axes[0, 2].set_xlabel("training steps, thousands")
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", title="published (Table 7)")
    return made


def losses(store: Sources) -> Figure:
    """Figure 9. Left and middle, theirs: training loss of DiCo on ImageNet 256 from the authors' own logs, means over windows of 1000 steps
    (10 000 beyond step 400 000); the band is two standard errors of a window's mean. Right, ours: Table 4's rows on the digits protocol,
    the newest training of seed 0, another data set at another scale, whose losses do not compare with the others."""
    made, (left, middle, right) = figure(10.6, 3.7, columns=3)
    rows = store.rows("dico_logs.csv")
    for index, model in enumerate(SIZES):
        own = [row for row in rows if row["model"] == model and row["loss_sd"]]
        steps = [(int(row["first_step"]) + int(row["last_step"])) / 2000 for row in own]
        loss = [float(row["loss"]) for row in own]
        error = [2 * float(row["loss_sd"]) / int(row["lines"]) ** 0.5 for row in own]
        for panel in (left, middle):
            panel.plot(steps, loss, lw=1, color=colour(index), label=f"{model} (authors' log)")
            panel.fill_between(steps, [a - b for a, b in zip(loss, error, strict=True)], [a + b for a, b in zip(loss, error, strict=True)], color=colour(index), alpha=0.2, lw=0)
    left.set_xscale("log")
    left.set_xlim(left=1)
    left.set_ylim(0.138, 0.185)
    left.set_title("theirs, ImageNet 256: whole logs")
    left.set_xlabel("training steps, thousands (log scale)")
    left.set_ylabel("training loss")
    middle.set_xlim(0, 100)
    middle.set_ylim(0.147, 0.185)
    middle.set_title("theirs: first 100 000 steps")
    middle.set_xlabel("training steps, thousands")
    middle.legend()
    _own_losses(right, store)
    return made


def _own_losses(axes: Axes, store: Sources) -> None:
    axes.set_title(f"ours: Table 4's rows on {DIGITS.name}")
    windows = set()
    for index, row in enumerate(TABLE_4.rows):
        record = store.latest(train_stage(row, DIGITS, 0), "reference")
        if record and (curve := record.values.get("curve")):
            ends = [min((number + 1) * curve["every"], record.values["steps"]) for number in range(len(curve["losses"]))]
            axes.plot([(start + end) / 2 for start, end in zip([0, *ends], ends, strict=False)], curve["losses"], lw=1, color=colour(index % 10), ls="-" if index < 10 else "--", label=row.label)
            windows.add(curve["every"])
    axes.set_xlabel(f"training steps (means over {' or '.join(map(str, sorted(windows)))})" if windows else "training steps")
    if windows:
        axes.legend(fontsize=6, ncols=2)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        note(axes, "no training with a curve\nis committed here")
