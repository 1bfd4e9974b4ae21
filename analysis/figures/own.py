"""What the paper lacks: seed spread and score against speed on digits, training efficiency, Pareto fronts, numeric modes. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.figures.paper import own_progress
from analysis.figures.style import (
    MARKS,
    PUBLISHED,
    SIZES,
    below,
    colour,
    errors,
    family_colour,
    figure,
    note,
)
from analysis.query import (
    ReferenceStore,
    at_one_batch,
    digits_scores,
    gpu_timings,
    rankable,
    runtime_of,
)
from analysis.tables.progress import progress_row, stopped
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.declared.systems import SYSTEMS
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import cost_stage, timing_stage, train_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BESIDE = {
    "DiT": (5, 4),
    "DiC": (6, -3),
    "DiG": (-5, 3),
    "DiCo": (-4, -9),
}  # where a family's names stand, points from its marks
ROUNDED = 1.0  # per cent, within which one rule meets a published count
A100_FP32 = 19.5  # TFLOP/s without tensor cores (NVIDIA A100 data sheet)


def score_against_speed(table: Table, store: ReferenceStore) -> Figure:
    """fd_digits of every row (mean and range over seeds) against its throughput relative to the table's first row; the front joins the
    rows that no other row beats in both."""
    made, axes = figure(7.6, 4.2)
    missing, points = [], []
    scores, other = rankable(table.rows, DIGITS, store)
    for index, (row, found) in enumerate(zip(table.rows, scores, strict=True)):
        timed = store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        scored = [record.values["fd_digits"] for record in found]
        if timed is None or not scored:
            missing += [row.label] * (row.label not in other)
            continue
        mean, speed = statistics.fmean(scored), timed.values["relative"]
        points.append((speed, mean))
        axes.errorbar(
            speed,
            mean,
            xerr=timed.values["relative_spread"],
            yerr=[[mean - min(scored)], [max(scored) - mean]],
            fmt=MARKS[index % 4],
            ms=5,
            capsize=2,
            elinewidth=0.8,
            color=colour(index % 10),
            label=row.label,
        )
    _draw_front(axes, points)
    _note_left_out(axes, other)
    if points:
        made.legend(loc="outside right center")
    axes.set_xlabel(
        f"throughput relative to {table.baseline.label}, CPU, 32x32x4, fp32, ± half the interquartile range"
    )
    axes.set_ylabel(
        f"fd_digits, mean and range of {len(digits_scores(table.baseline, store))} seeds (lower is better)"
    )
    if table is TABLE_3:
        _plain_log(axes, "y")
    axes.set_title(
        f"Table {table.number}'s rows on the digits protocol"
        + (f" (no record: {', '.join(missing)})" if missing else "")
    )
    return made


def table3_score_speed(store: ReferenceStore) -> Figure:
    """Table 3's rows on digits: fd_digits (mean and range over training seeds, log scale) against throughput on a CPU in fp32, relative to
    DiT (iso.). The grey line is the Pareto front of the means."""
    return score_against_speed(TABLE_3, store)


def table4_score_speed(store: ReferenceStore) -> Figure:
    """Table 4's rows on digits: fd_digits (mean and range over training seeds) against throughput on a CPU in fp32, relative to DiCo-S. The
    grey line is the Pareto front of the means, whose order the seeds need not resolve."""
    return score_against_speed(TABLE_4, store)


def seed_spread(store: ReferenceStore) -> Figure:
    """fd_digits of every training seed (dots) and their mean (bar) for the rows of Tables 3 and 4 on digits. Rows that are one network
    in both tables share their records."""
    made, axes = figure(8.2, 4.2, columns=2, width_ratios=(1, 1.25))
    for panel, table in zip(axes, (TABLE_3, TABLE_4), strict=True):
        scores, other = rankable(table.rows, DIGITS, store)
        _note_left_out(panel, other)
        for place, found in enumerate(reversed(scores)):
            scored = [record.values["fd_digits"] for record in found]
            panel.plot(scored, [place] * len(scored), "o", ms=4.5, color=colour(0), alpha=0.8)
            if scored:
                panel.plot(
                    [statistics.fmean(scored)] * 2,
                    [place - 0.3, place + 0.3],
                    "-",
                    color="black",
                    lw=1.4,
                )
        panel.set_yticks(range(len(table.rows)), [row.label for row in reversed(table.rows)])
        panel.set_title(f"Table {table.number}")
        panel.set_xlabel(
            "fd_digits, one dot a training seed" + (" (log scale)" if table is TABLE_3 else "")
        )
    _plain_log(axes[0], "x")
    return made


def training_efficiency(store: ReferenceStore) -> Figure:
    """What training costs. Left: FID (Table 7, no guidance) against multiply-accumulates of training, three forward passes an image of Table
    6's batch. Middle: against GPU-hours, from the authors' logs and Table 6's GPU counts. Filled in both, ours: Gflops counted here, hours
    by the rate of a training's last attempt; a note says how many there are. Right: ours on digits, fd_digits (mean of seeds)
    against wall seconds times threads of the fastest of its
    trainings, on a machine that was shared. The panels' scores do not compare with each other."""
    made, (left, middle, right) = figure(9.4, 3.6, columns=3)
    gpus = {
        row["model"]: int(row["gpus"].partition("x")[0])
        for row in store.rows("table6.csv")
        if row["resolution"] == "256"
    }
    batch = {
        row["model"]: int(row["global_batch_size"])
        for row in store.rows("table6.csv")
        if row["resolution"] == "256"
    }
    hours = {
        (row["model"], row["last_step"]): float(row["hours"]) for row in store.rows("dico_logs.csv")
    }
    ours, refused = own_progress(store.rows("table7.csv"), store)
    drawn = dict.fromkeys((left, middle), 0)
    for index, model in enumerate(SIZES):
        rows = [row for row in store.rows("table7.csv") if row["model"] == model]
        fid = [float(row["fid"]) for row in rows]
        for panel, cost in (
            (
                left,
                [
                    3 * batch[model] * float(row["gflops"]) * 1e9 * int(row["train_steps"])
                    for row in rows
                ],
            ),
            (middle, [gpus[model] * hours[model, row["train_steps"]] for row in rows]),
        ):
            panel.plot(
                cost, fid, f"-{MARKS[index]}", ms=4, color=colour(index), label=model, **PUBLISHED
            )
        scored = [(steps, record) for (size, steps), record in ours.items() if size == model]
        for panel, costs in (
            (left, [_macs(model, record, store) for _, record in scored]),
            (middle, [_gpu_hours(model, steps, store) for steps, _ in scored]),
        ):
            if found := [
                (cost, record.values["fid"], record.values.get("fid_se"))
                for cost, (_, record) in zip(costs, scored, strict=True)
                if cost
            ]:
                cost, fid, spread = zip(*found, strict=True)
                panel.plot(
                    cost,
                    fid,
                    f"--{MARKS[index]}",
                    ms=5,
                    color=colour(index),
                    label=f"{model}, ours",
                )
                errors(panel, cost, fid, colour(index), yerr=spread)
                drawn[panel] += len(found)
    below(
        made,
        [
            f"ours on ImageNet 256: {drawn[left]} of the {len(store.rows('table7.csv'))} published points left, {drawn[middle]} in the middle",
            *refused,
        ],
    )
    left.set_xlabel("training MACs (open: published Gflops)")
    middle.set_xlabel("GPU-hours (open: A100, authors' logs)")
    left.set_ylabel("FID-50K, ImageNet 256 (open: published)")
    left.legend()
    for panel in (left, middle):
        panel.set_xscale("log")
        _plain_log(panel, "y")
    left_out = {}
    for index, table in enumerate((TABLE_3, TABLE_4)):
        cost, score, other = _digits_cost(table, store)
        left_out |= other
        right.plot(
            cost,
            score,
            MARKS[index],
            ms=(8, 4)[index],
            color=colour(index),
            label=f"Table {table.number}'s rows",
        )
    _plain_log(right, "y")
    _note_left_out(right, left_out)
    right.set_xlabel("wall seconds x threads, fastest seed (ours)")
    right.set_ylabel("fd_digits (ours)")
    right.legend()
    return made


def _macs(model: str, record: Record, store: ReferenceStore) -> float | None:
    """Multiply-accumulates of the training behind a score: three forward passes an image, counted as the paper counts; None without the count."""
    count, recipe = (
        store.reference.latest(cost_stage(progress_row(model))),
        record.spec["train"]["recipe"],
    )
    return (
        3 * recipe["batch"] * recipe["steps"] * count.values["macs_torchprofile"] if count else None
    )


def _gpu_hours(model: str, steps: int, store: ReferenceStore) -> float | None:
    """Of our training of a model to so many steps, by the images a second of its last attempt on all its GPUs; None without its record or off a GPU."""
    record = store.reference.latest(train_stage(progress_row(model), stopped(steps), 0))
    if (
        record is None
        or record.provenance["device"] == "cpu"
        or not record.values.get("images_per_s")
    ):
        return None
    return (
        record.provenance["world_size"]
        * steps
        * record.spec["recipe"]["batch"]
        / record.values["images_per_s"]
        / 3600
    )


def _digits_cost(
    table: Table, store: ReferenceStore
) -> tuple[list[float], list[float], dict[str, list[str]]]:
    """Seconds times threads of the fastest training, and fd_digits, a mean over seeds, of the rows that have both; and rows of another protocol."""
    costs, means = [], []
    scores, other = rankable(table.rows, DIGITS, store)
    for row, scored in zip(table.rows, scores, strict=True):
        trained = [
            record
            for seed in REFERENCE_SEEDS
            if (record := store.reference.latest(train_stage(row, DIGITS, seed)))
        ]
        if trained and scored:
            costs.append(
                min(
                    record.provenance["seconds"] * record.provenance["threads"]
                    for record in trained
                )
            )
            means.append(statistics.fmean(record.values["fd_digits"] for record in scored))
    return costs, means, other


def pareto(store: ReferenceStore) -> Figure:
    """Pareto fronts of the published ImageNet 256 results after 400K steps (Table 1): FID against Gflops as the paper prints them, against
    Gflops counted here by one rule for all (filled), and against published throughput. The second panel names the systems whose count by
    one rule is further from the published one than its rounding."""
    made, axes = figure(9.4, 3.7, columns=3, sharey=True)
    rows = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000"]
    core = {
        system.label: sum(record.values["macs_core"] for record in records) / 1e9
        for system in SYSTEMS
        if system.resolution == 256
        and all(records := [store.reference.latest(cost) for cost in system.costs])
    }
    panels = (
        (
            "Gflops (published)",
            {row["model"]: float(row["gflops"]) for row in rows if row["gflops"]},
            True,
        ),
        (
            "Gflops, one rule for all (counted here)",
            {row["model"]: core[row["model"]] for row in rows if row["model"] in core},
            True,
        ),
        (
            "images/s, A100 (published)",
            {
                row["model"]: float(row["throughput_img_s"])
                for row in rows
                if row["throughput_img_s"]
            },
            False,
        ),
    )
    for panel, (label, costs, lower) in zip(axes, panels, strict=True):
        points = []
        for row in rows:
            if row["model"] in costs:
                x, y = costs[row["model"]], float(row["fid"])
                points.append((x, y))
                style = {} if "counted" in label else PUBLISHED
                panel.plot(
                    x,
                    y,
                    "D" if "counted" in label else "o",
                    ms=5,
                    color=family_colour(row["model"]),
                    **style,
                )
                family, _, size = row["model"].removesuffix("/2").partition("-")
                panel.annotate(
                    size,
                    (x, y),
                    xytext=BESIDE[family],
                    textcoords="offset points",
                    fontsize=7,
                    ha="left" if BESIDE[family][0] > 0 else "right",
                    color=family_colour(family),
                )
        panel.set_xscale("log")
        panel.margins(x=0.1, y=0.08)
        _draw_front(panel, points, lower)
        panel.set_xlabel(label)
    moved = {
        row["model"]: 100 * (core[row["model"]] / float(row["gflops"]) - 1)
        for row in rows
        if row["model"] in core and row["gflops"]
    }
    if far := [
        f"{model} {percent:+.0f} %" for model, percent in moved.items() if abs(percent) > ROUNDED
    ]:
        note(axes[1], "counted, of published:\n" + "\n".join(far))
    axes[0].set_ylabel("FID-50K, ImageNet 256, 400K steps (published)")
    for family in dict.fromkeys(row["model"].partition("-")[0] for row in rows):
        axes[0].plot([], [], "o", color=family_colour(family), label=family, **PUBLISHED)
    axes[0].legend()
    return made


def numeric_modes(store: ReferenceStore) -> Figure:
    """Does the speed-up depend on the numeric mode? Left: arithmetic rate that the published throughput implies (two operations a published
    multiply-accumulate) against an A100's peak in fp32 without tensor cores: a rate well above the line cannot be fp32. Right: ours, the
    speed-up of DiCo-XL over DiT-XL/2 in every numeric mode in which both were timed at one batch on a GPU here, with the spread of both."""
    made, (left, right) = figure(9.0, 4.2, columns=2, width_ratios=(1.7, 1))
    rows = {
        (row["model"], resolution): row
        for resolution in (512, 256)
        for row in reversed(store.rows(f"table{1 if resolution == 256 else 2}.csv"))
        if row["throughput_img_s"] and row["gflops"]
    }
    bars = [
        (
            f"{model} at {resolution}",
            model,
            2e-3 * float(row["throughput_img_s"]) * float(row["gflops"]),
        )
        for (model, resolution), row in rows.items()
    ]
    for label, model, rate in bars:
        left.barh(label, rate, color=(*family_colour(model), 0.25), ec=family_colour(model), lw=1.2)
    left.axvline(A100_FP32, color="black", lw=1.2, ls="--")
    left.annotate(
        "A100 peak in fp32",
        (A100_FP32, 0.985),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=7.5,
    )
    left.set_xlabel("implied TFLOP/s (published throughput x 2 x published MACs)")
    left.tick_params(axis="y", labelsize=6.5)
    drawn = 0
    for resolution in (256, 512):
        pair = {
            system.label: system
            for system in SYSTEMS
            if system.label in ("DiCo-XL", "DiT-XL/2") and system.resolution == resolution
        }
        timings = {
            label: gpu_timings(system.costs[0].backbone, system.costs[0].size, store)
            for label, system in pair.items()
        }
        for (mode, device, batch), at in sorted(at_one_batch(timings).items()):
            if len(at) == len(pair):
                (one, one_error), (two, two_error) = (
                    runtime_of(at[label]) for label in ("DiCo-XL", "DiT-XL/2")
                )
                error = two / one * math.hypot(one_error / one, two_error / two)
                right.barh(
                    f"{mode}\n{device}, {resolution}, batch {batch}",
                    two / one,
                    xerr=error,
                    color=colour(1),
                    error_kw=dict(elinewidth=0.8),
                )
                drawn += 1
    right.set_xlabel("speed-up over DiT-XL/2 (ours)")
    if not drawn:
        right.set_yticks([])
        right.set_xticks([])
        right.text(
            0.5,
            0.5,
            "gap: no GPU timing\nis committed here",
            ha="center",
            va="center",
            transform=right.transAxes,
            color="0.35",
        )
    return made


def front(points: Sequence[tuple[float, float]], lower: bool = False) -> list[tuple[float, float]]:
    """Points that no other point beats: lower second coordinate, and higher (or with `lower`, lower) first."""
    sign = -1 if lower else 1
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-sign * point[0], point[1])):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _note_left_out(axes: Axes, other: dict[str, list[str]]) -> None:
    """Names the rows whose scores are of another protocol than their table's first, which no axis orders."""
    if other:
        note(axes, f"left out, scored by another protocol: {', '.join(other)}")


def _plain_log(axes: Axes, which: str) -> None:
    """A log scale whose ticks from 10 to 200 are plain numbers; `which` is 'x' or 'y'."""
    ticks = [10, 20, 50, 100, 200]
    axes.set(**{f"{which}scale": "log", f"{which}ticks": ticks, f"{which}ticklabels": ticks})
    axes.minorticks_off()


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]], lower: bool = False) -> None:
    if kept := front(points, lower):
        axes.plot(*zip(*kept, strict=True), "-", color="0.6", lw=1, zorder=0)
