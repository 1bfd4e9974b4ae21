"""Figures 8 and 9 of the paper: scores and losses over training. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.labels import Point, label_lines
from analysis.figures.style import (
    MARKS,
    OPEN,
    SIZES,
    Color,
    below,
    errors,
    figure,
    mark_gap,
    palette,
)
from analysis.query import ReferenceStore
from analysis.tables.progress import progress_curve, progress_score
from analysis.tables.recipes import CONFIGURATIONS
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.comparison import clashes
from experiments.engine.records.score_names import PAPER_SCORES_WITH_SFID, Score
from experiments.engine.records.store import Record
from experiments.engine.specs.stages import train_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OwnProgress:
    """Our scores at the steps of Table 7, all of the first one's protocol."""

    # By model and training steps.
    scores: dict[tuple[str, int], Record]
    # Model and training steps of the scores of another protocol.
    left_out: list[tuple[str, int]]

    def of(self, model: str) -> dict[int, Record]:
        """Return a model's scores by training steps."""
        return {steps: record for (name, steps), record in self.scores.items() if name == model}

    def remarks(self) -> list[str]:
        """Return a sentence on what was left out, if anything was."""
        if not self.left_out:
            return []
        names = ", ".join(f"{model} after {steps}" for model, steps in self.left_out)
        return [f"left out, scored by another protocol: {names}"]


def own_progress(rows: Sequence[dict[str, str]], store: ReferenceStore) -> OwnProgress:
    """Return our scores at the steps of Table 7's rows."""
    scores = {}
    for row in rows:
        record = progress_score(row, store)
        if record:
            scores[row["model"], int(row["train_steps"])] = record
    first = list(scores.values())[:1]
    left_out = [key for key, record in scores.items() if clashes([record], first)]
    return OwnProgress(
        {key: record for key, record in scores.items() if key not in left_out}, left_out
    )


def scores_over_training(store: ReferenceStore) -> Figure:
    """Figure 8 and Table 7: scores of 50K images over training on ImageNet 256 without guidance.
    Open marks are published. Filled marks are ours, of trainings to that many steps under the same
    protocol, ± their sampling standard error; a note says how many there are."""
    drawing, axes = figure(8.2, 4.6, 2, 3)
    rows = store.rows("table7.csv")
    ours = own_progress(rows, store)
    for panel, score in zip(axes.flat, PAPER_SCORES_WITH_SFID, strict=False):
        _draw_scores(panel, score, rows, ours)
        panel.set_title(f"{score.name} ({score.better.value} is better)")

    # The last panel is empty, so the one above it names the steps.
    for panel in (*axes[1], axes[0, 2]):
        panel.set_xlabel("training steps, thousands")
    axes[1, 2].axis("off")
    marks = "open marks: published, Table 7; filled marks: ours"
    count = f"ours: {len(ours.scores)} of the {len(rows)} published points are recorded here"
    below(drawing, [marks, count, *ours.remarks()])
    return drawing


def _draw_scores(
    axes: Axes, score: Score, rows: Sequence[dict[str, str]], ours: OwnProgress
) -> None:
    """Draw one score of all models, published and ours."""
    colors = palette(SIZES)
    ends = []
    for mark, model in zip(MARKS, SIZES, strict=True):
        published = [row for row in rows if row["model"] == model]
        steps = [int(row["train_steps"]) / 1000 for row in published]
        values = [float(row[score.paper]) for row in published]
        axes.plot(steps, values, f"-{mark}", ms=4, color=colors[model], label=model, **OPEN)
        ends.append(Point(model, steps[-1], values[-1], colors[model]))

        own = {
            steps / 1000: record
            for steps, record in ours.of(model).items()
            if record.values.get(score.key) is not None
        }
        if own:
            steps = list(own)
            values = [record.values[score.key] for record in own.values()]
            label = f"{model}, ours"
            axes.plot(steps, values, f"--{mark}", ms=5, color=colors[model], label=label)
            spreads = [record.values.get(score.error) for record in own.values()]
            errors(axes, steps, values, colors[model], yerr=spreads)
    label_lines(axes, ends)


def losses(store: ReferenceStore) -> Figure:
    """Figure 9. Left and middle, theirs: training loss of DiCo on ImageNet 256 from the authors'
    own logs, as means over windows of 1000 steps (10 000 beyond step 400 000); the band is two
    standard errors of a window's mean. Dashed lines are ours by the same recipe, over windows of
    their own; a note says how many there are. Right, ours: Table 4's rows on the digits protocol,
    the newest training of seed 0. That is another data set at another scale, so its losses do not
    compare with the others."""
    drawing, (left, middle, right) = figure(11.6, 3.7, columns=3)
    curves = _authors_losses(store.rows("dico_logs.csv"))
    for panel in (left, middle):
        _draw_authors_losses(panel, curves)
    below(drawing, [_draw_own_trainings((left, middle), store)])
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

    # Labels stand at the last windows that a panel shows, so its limits come first.
    for panel in (left, middle):
        label_lines(panel, [curve.end_before(panel.get_xlim()[1]) for curve in curves])
    _draw_digits_losses(right, store)
    return drawing


@dataclass(frozen=True)
class LossCurve:
    """The training loss of a network by the authors' log, as means over windows."""

    model: str
    color: Color
    # Middles of the windows, in thousands of steps.
    steps: list[float]
    means: list[float]
    # Two standard errors of each mean, from the spread of a window's logged lines.
    spreads: list[float]

    def end_before(self, limit: float) -> Point:
        """Return the last window up to a limit, as the point that carries the label."""
        last = max(place for place, step in enumerate(self.steps) if step <= limit)
        return Point(self.model, self.steps[last], self.means[last], self.color, radius=0)


def _authors_losses(rows: Sequence[dict[str, str]]) -> list[LossCurve]:
    """Return the curves of the authors' logs; a window without a spread is left out."""
    curves = []
    for model, color in palette(SIZES).items():
        windows = [row for row in rows if row["model"] == model and row["loss_sd"]]
        steps = [(int(row["first_step"]) + int(row["last_step"])) / 2000 for row in windows]
        means = [float(row["loss"]) for row in windows]
        spreads = [2 * float(row["loss_sd"]) / int(row["lines"]) ** 0.5 for row in windows]
        curves.append(LossCurve(model, color, steps, means, spreads))
    return curves


def _draw_authors_losses(axes: Axes, curves: Sequence[LossCurve]) -> None:
    for curve in curves:
        axes.plot(
            curve.steps, curve.means, lw=1, color=curve.color, label=f"{curve.model} (authors' log)"
        )
        bands = list(zip(curve.means, curve.spreads, strict=True))
        low = [mean - spread for mean, spread in bands]
        high = [mean + spread for mean, spread in bands]
        axes.fill_between(curve.steps, low, high, color=curve.color, alpha=0.2, lw=0)


def _draw_own_trainings(panels: Sequence[Axes], store: ReferenceStore) -> str:
    """Draw our trainings on ImageNet 256 over the authors', and say how many there are.

    Of each size it is the whole training, else the longest one that Table 7 asks for.
    """
    steps = sorted({int(row["train_steps"]) for row in store.rows("table7.csv")})
    drawn = 0

    # Without a whole training, the longest curve of the steps in Table 7 is drawn.
    for model, color in palette(SIZES).items():
        record = store.reference.latest(train_stage(*CONFIGURATIONS[f"{model} 256"], 0))
        if record is None or not record.values.get("curve"):
            record = progress_curve(model, steps, store)
        if record is None:
            continue

        drawn += 1
        thousands = [step / 1000 for step in _window_middles(record)]
        means = record.values["curve"]["losses"]
        for panel in panels:
            panel.plot(thousands, means, "--", lw=1, color=color, label=f"{model}, ours")
    return f"ours on ImageNet 256: {drawn} of the {len(SIZES)} trainings are recorded here"


def _window_middles(record: Record) -> list[float]:
    """Return the middles of the windows of a training's curve, in steps.

    The last window may be cut short.
    """
    curve = record.values["curve"]
    last_step = record.values["steps"]
    count = len(curve["losses"])
    ends = [min((number + 1) * curve["every"], last_step) for number in range(count)]
    starts = [0, *ends[:-1]]
    return [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]


def _draw_digits_losses(axes: Axes, store: ReferenceStore) -> None:
    axes.set_title(f"ours: Table 4's rows on {DIGITS.name}")
    axes.set_xlabel("training steps")
    colors = palette(row.label for row in TABLE_4.rows)
    windows = set()
    ends = []
    for row in TABLE_4.rows:
        record = store.reference.latest(train_stage(row, DIGITS, 0))
        curve = record.values.get("curve") if record else None
        if record is None or not curve:
            continue
        color = colors[row.label]
        middles = _window_middles(record)
        axes.plot(middles, curve["losses"], lw=1, color=color, label=row.label)
        ends.append(Point(row.label, middles[-1], curve["losses"][-1], color, radius=0))
        windows.add(curve["every"])

    if not windows:
        mark_gap(axes, "no training with a curve\nis committed here")
        return
    lengths = " or ".join(str(window) for window in sorted(windows))
    axes.set_xlabel(f"training steps (means over {lengths})")
    label_lines(axes, ends, fontsize=6)
