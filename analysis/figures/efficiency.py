"""What training costs, published and ours. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_points
from analysis.figures.style import (
    MARKS,
    OPEN,
    SIZES,
    below,
    errors,
    figure,
    palette,
    plain_log,
)
from analysis.figures.training import OwnProgress, own_progress
from analysis.query import DIGITS_SCORE, ReferenceStore, rankable
from analysis.tables.progress import progress_row, stopped
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.specs.rows import Row
from experiments.engine.specs.stages import cost_stage, train_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES = 3  # of a training step, in forward passes: forward, and backward at twice its cost
Published = dict[str, str]


def training_efficiency(store: ReferenceStore) -> Figure:
    """What training costs. Left: FID without guidance (Table 7) against the multiply-accumulates of
    training, three forward passes per image of Table 6's batch. Middle: FID against GPU-hours, from
    the authors' logs and Table 6's GPU counts. Filled marks in both are ours, with Gflops counted
    here and hours from the rate of a training's last attempt; a note says how many there are.
    Right, ours on digits: held-out loss, a mean over seeds, against wall seconds times threads of
    the fastest training, on a machine that was shared; a network of both tables is drawn once.
    Scores do not compare between the panels."""
    drawing, (left, middle, right) = figure(11.4, 4.0, columns=3, width_ratios=(1, 1, 1.4))
    rows = store.rows("table7.csv")
    costs = _PublishedCosts(store)
    ours = own_progress(rows, store)

    counted = _draw_cost(left, rows, costs.macs, ours, _Costs(_own_macs, store))
    timed = _draw_cost(middle, rows, costs.gpu_hours, ours, _Costs(_own_gpu_hours, store))
    left.set_xlabel("training MACs (open: published Gflops)")
    middle.set_xlabel("GPU-hours (open: A100, authors' logs)")
    left.set_ylabel("FID-50K, ImageNet 256 (open: published)")
    left.legend()

    count = f"ours on ImageNet 256: {counted} of the {len(rows)} published points left"
    remarks = [f"{count}, {timed} in the middle", *ours.remarks()]
    below(drawing, remarks + _draw_digits_cost(right, store))
    return drawing


class _PublishedCosts:
    """What the paper's trainings cost, from its tables and logs."""

    def __init__(self, store: ReferenceStore) -> None:
        recipes = [row for row in store.rows("table6.csv") if row["resolution"] == "256"]
        self.gpus = {row["model"]: int(row["gpus"].partition("x")[0]) for row in recipes}
        self.batch = {row["model"]: int(row["global_batch_size"]) for row in recipes}
        self.hours = {
            (row["model"], row["last_step"]): float(row["hours"])
            for row in store.rows("dico_logs.csv")
        }

    def macs(self, row: Published) -> float:
        """Return the multiply-accumulates of the training of a row of Table 7."""
        images = self.batch[row["model"]] * int(row["train_steps"])
        return PASSES * float(row["gflops"]) * 1e9 * images

    def gpu_hours(self, row: Published) -> float:
        """Return the GPU-hours of the training of a row of Table 7."""
        return self.gpus[row["model"]] * self.hours[row["model"], row["train_steps"]]


@dataclass(frozen=True)
class _Costs:
    """How the cost of one of our trainings is found."""

    # (model, steps, score, store) -> cost, or None without the records that it needs.
    cost: Callable[[str, int, Record, ReferenceStore], float | None]
    store: ReferenceStore

    def of(self, model: str, ours: OwnProgress) -> list[tuple[float, Record]]:
        """Return the cost and the score of each of our trainings of a model."""
        pairs = []
        for steps, record in ours.of(model).items():
            cost = self.cost(model, steps, record, self.store)
            if cost:
                pairs.append((cost, record))
        return pairs


def _own_macs(model: str, steps: int, score: Record, store: ReferenceStore) -> float | None:
    """Return the multiply-accumulates of the training behind a score, by the paper's rule."""
    count = store.reference.latest(cost_stage(progress_row(model)))
    if count is None:
        return None
    recipe = score.spec["train"]["recipe"]
    return PASSES * recipe["batch"] * recipe["steps"] * count.values["macs_torchprofile"]


def _own_gpu_hours(model: str, steps: int, score: Record, store: ReferenceStore) -> float | None:
    """Return the GPU-hours of a training, by the rate of its last attempt on all its GPUs."""
    record = store.reference.latest(train_stage(progress_row(model), stopped(steps), 0))
    if record is None or record.provenance["device"] == "cpu":
        return None
    rate = record.values.get("images_per_s")
    if not rate:
        return None
    seconds = steps * record.spec["recipe"]["batch"] / rate
    return record.provenance["world_size"] * seconds / 3600


def _draw_cost(
    axes: Axes,
    rows: list[Published],
    published_cost: Callable[[Published], float],
    ours: OwnProgress,
    own_costs: _Costs,
) -> int:
    """Draw FID against a cost, published and ours; return how many points are ours."""
    drawn = 0
    colors = palette(SIZES)
    for mark, model in zip(MARKS, SIZES, strict=True):
        published = [row for row in rows if row["model"] == model]
        cost = [published_cost(row) for row in published]
        fid = [float(row["fid"]) for row in published]
        axes.plot(cost, fid, f"-{mark}", ms=4, color=colors[model], label=model, **OPEN)

        pairs = own_costs.of(model, ours)
        if pairs:
            cost = [cost for cost, _ in pairs]
            fid = [record.values["fid"] for _, record in pairs]
            label = f"{model}, ours"
            axes.plot(cost, fid, f"--{mark}", ms=5, color=colors[model], label=label)
            spreads = [record.values.get("fid_se") for _, record in pairs]
            errors(axes, cost, fid, colors[model], yerr=spreads)
            drawn += len(pairs)
    axes.set_xscale("log")
    plain_log(axes, "y")
    return drawn


def _draw_digits_cost(axes: Axes, store: ReferenceStore) -> list[str]:
    """Draw the held-out loss against training time; return remarks on rows of another protocol.

    A row that both tables declare as one network is drawn once.
    """
    left_out: dict[str, list[str]] = {}
    points: dict[tuple[float, float], Point] = {}

    # Each table has its own colour and mark; scores of another protocol are set aside.
    tables = {f"Table {table.number}'s rows": table for table in (TABLE_3, TABLE_4)}
    for (name, color), mark in zip(palette(tables).items(), MARKS, strict=False):
        scores, other = rankable(tables[name].rows, DIGITS, store)
        left_out |= other
        label: str | None = name
        for row, scored in zip(tables[name].rows, scores, strict=True):
            cost = _fastest_training(row, store)
            if cost is None or not scored:
                continue
            score = statistics.fmean(record.values[DIGITS_SCORE.key] for record in scored)
            if (cost, score) in points:
                continue
            axes.plot(cost, score, mark, ms=5, color=color, label=label)
            points[cost, score] = Point(row.label, cost, score, color)
            label = None  # the legend names a table once

    # The labels come last, because they need the final limits and scales of the axes.
    plain_log(axes, "y")
    axes.margins(x=0.12)
    axes.set_xlabel("wall seconds x threads, fastest seed (ours)")
    axes.set_ylabel(f"{DIGITS_SCORE.name} (ours)")
    if points:
        axes.legend(loc="upper right")
    label_points(axes, list(points.values()), fontsize=6.5)

    if not left_out:
        return []
    return [f"right: left out, scored by another protocol: {', '.join(left_out)}"]


def _fastest_training(row: Row, store: ReferenceStore) -> float | None:
    """Return the seconds times threads of a row's fastest training on digits."""
    records = [store.reference.latest(train_stage(row, DIGITS, seed)) for seed in REFERENCE_SEEDS]
    costs = [
        record.provenance["seconds"] * record.provenance["threads"] for record in records if record
    ]
    return min(costs, default=None)
