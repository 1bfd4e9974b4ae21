"""Figures of our own records: what is drawn, with which errors, in which colours and labels."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from analysis.figures.catalogue import FIGURES
from analysis.figures.efficiency import training_efficiency
from analysis.figures.labels import Point, label_lines, label_points, spread_apart
from analysis.figures.modes import numeric_modes
from analysis.figures.runtime import runtime
from analysis.figures.style import figure, palette
from analysis.figures.throughput import fid_against_throughput
from analysis.figures.training import losses, scores_over_training
from analysis.query import ReferenceStore
from analysis.tables.progress import progress_row, stopped
from analysis.tables.recipes import CONFIGURATIONS
from experiments.declared import timings as speed
from experiments.declared.protocols import IMAGENET256
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone, Evaluate, Timing
from experiments.engine.specs.stages import cost_stage, evaluate_stage, train_stage
from experiments.main_results import TABLE_1
from tests.support.references import (
    GPU_PROVENANCE,
    commit_records,
    imagenet_values,
    reopen_records,
    timing_values,
)

PROVENANCE = GPU_PROVENANCE | {"world_size": 8}


def scored(store: Store, stage: Evaluate, fid: float, error: float | None = 0.5) -> None:
    """Append the scores of a stage."""
    store.append(stage, "done", imagenet_values(stage, fid, error), PROVENANCE)


def trained(store: Store, stage: Any, values: dict[str, Any], device: str = "a GPU") -> None:
    """Append a finished training."""
    store.append(stage, "done", values, PROVENANCE | {"device": device})


def timed(store: Store, stage: Timing, rate: float, spread: float) -> None:
    """Append a timing."""
    store.append(stage, "done", timing_values(rate, spread), PROVENANCE)


def on_gpu(name: str, side: int) -> Timing:
    return Timing(Backbone(name), side, 4, 1000, 64, "cuda")


def bars(axes: Any) -> list[list[tuple[float, float]]]:
    """Return both ends of every error bar, in drawing order, without those of unknown length."""
    lines = [container.lines[2] for container in axes.containers if hasattr(container, "has_xerr")]
    segments = [segment for parts in lines for part in parts for segment in part.get_segments()]
    ends = [[(float(x), float(y)) for x, y in segment] for segment in segments]
    return [bar for bar in ends if bar and not math.isnan(sum(map(sum, bar)))]


def remarks(drawing: Any) -> str:
    return drawing.get_supxlabel().replace("\n", " ")


def labelled(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines}


def test_figure_9_draws_our_longest_training_over_the_authors(tmp_path: Path):
    """Of two lengths of a training the longer one is drawn, if it has a curve."""
    empty = losses(ReferenceStore(tmp_path / "none"))
    assert remarks(empty) == "ours on ImageNet 256: 0 of the 4 trainings are recorded here"

    # Two lengths of DiCo-S, DiCo-B without a curve, and DiCo-XL to its end.
    store = Store(tmp_path)
    for steps, loss, windows in ((50_000, 0.17, 2), (100_000, 0.16, 3)):
        stage = train_stage(progress_row("DiCo-S"), stopped(steps), 0)
        curve = {"every": 40_000, "losses": [loss] * windows}
        trained(store, stage, {"steps": steps, "curve": curve})
    trained(store, train_stage(progress_row("DiCo-B"), stopped(50_000), 0), {"steps": 50_000})
    curve = {"every": 2_000_000, "losses": [0.15, 0.14]}
    whole = train_stage(*CONFIGURATIONS["DiCo-XL 256"], 0)
    trained(store, whole, {"steps": 3_750_000, "curve": curve})

    # A loss is drawn at the middle of its window, in thousands of steps.
    drawing = losses(commit_records(tmp_path))
    for panel in drawing.axes[:2]:
        ours = labelled(panel)
        assert ours["DiCo-S, ours"].get_xdata().tolist() == [20.0, 60.0, 90.0]
        assert set(ours["DiCo-S, ours"].get_ydata()) == {0.16}
        assert ours["DiCo-XL, ours"].get_xdata().tolist() == [1000.0, 2875.0]
        assert "DiCo-B, ours" not in ours
    assert remarks(drawing) == "ours on ImageNet 256: 2 of the 4 trainings are recorded here"


def test_training_efficiency_draws_our_trainings_by_counts_and_hours(tmp_path: Path):
    """A score needs a count to be drawn on the left, and a training on a GPU in the middle."""
    ours = "ours on ImageNet 256:"
    empty = training_efficiency(ReferenceStore(tmp_path / "none"))
    assert remarks(empty) == f"{ours} 0 of the 32 published points left, 0 in the middle"

    # DiCo-S has a count and two scores; one of its trainings ran on a CPU. DiCo-B has no count.
    store = Store(tmp_path)
    row = progress_row("DiCo-S")
    scored(store, evaluate_stage(row, stopped(50_000), 0), 90.0)
    scored(store, evaluate_stage(row, stopped(100_000), 0), 70.0)
    scored(store, evaluate_stage(progress_row("DiCo-B"), stopped(50_000), 0), 60.0)
    store.append(cost_stage(row), "done", {"macs_torchprofile": 4e9}, PROVENANCE)
    speed_of = {"images_per_s": 2560.0}
    trained(store, train_stage(row, stopped(100_000), 0), {"steps": 100_000} | speed_of)
    trained(store, train_stage(row, stopped(50_000), 0), {"steps": 50_000} | speed_of, "cpu")
    drawing = training_efficiency(commit_records(tmp_path))
    left, middle = drawing.axes[:2]

    # A training step costs three forward passes of 256 images.
    macs = labelled(left)["DiCo-S, ours"]
    assert macs.get_xdata().tolist() == [3 * 256 * 4e9 * steps for steps in (50_000, 100_000)]
    assert macs.get_ydata().tolist() == [90.0, 70.0]
    assert [[y for _, y in bar] for bar in bars(left)] == [[89.5, 90.5], [69.5, 70.5]]

    # Hours are those of all eight GPUs.
    hours = labelled(middle)["DiCo-S, ours"]
    assert hours.get_xdata().tolist() == pytest.approx([8 * 100_000 * 256 / 2560 / 3600])
    assert hours.get_ydata().tolist() == [70.0]
    assert remarks(drawing) == f"{ours} 2 of the 32 published points left, 1 in the middle"


def test_figure_2_has_the_errors_of_score_and_speed(tmp_path: Path):
    """Of one seed that of sampling; of two the standard error of their mean."""
    store = Store(tmp_path)
    row = TABLE_1.row("DiCo-S")
    store.append(cost_stage(row), "done", {"macs_torchprofile": 4e9}, PROVENANCE)
    timed(store, on_gpu("dico_s", 32), 1000.0, 20.0)
    scored(store, evaluate_stage(row, IMAGENET256, 0), 50.0)
    (axes,) = fid_against_throughput(commit_records(tmp_path)).axes
    assert bars(axes) == [[(980.0, 50.0), (1020.0, 50.0)], [(1000.0, 49.5), (1000.0, 50.5)]]

    # A second seed.
    store = reopen_records(tmp_path)
    scored(store, evaluate_stage(row, IMAGENET256, 1), 52.0)
    (axes,) = fid_against_throughput(commit_records(tmp_path)).axes
    assert bars(axes)[1] == [(1000.0, pytest.approx(50.0)), (1000.0, pytest.approx(52.0))]


def test_figure_3_has_the_spread_of_runtimes(tmp_path: Path):
    """Error bars reach from the runtime at the higher speed to that at the lower one."""
    store = Store(tmp_path)
    timed(store, on_gpu("dico_xl", 64), 50.0, 5.0)
    for stage in speed.figure_3("cuda"):
        if (stage.backbone.name, stage.size, stage.precision) == ("dit_s_2", 64, "bf16"):
            timed(store, stage, 100.0, 1.0)

    # 20 ms with a spread of a tenth, and 10 ms with one of a hundredth.
    left, _, right = runtime(commit_records(tmp_path)).axes
    assert [[x for x, _ in bar] for bar in bars(left)] == [pytest.approx([18.0, 22.0])]
    assert [[y for _, y in bar] for bar in bars(right)] == [pytest.approx([9.9, 10.1])]


@pytest.mark.parametrize("error", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_figure_8_has_the_sampling_errors_that_there_are(error: float | None, tmp_path: Path):
    """A score without a sampling error has no bar."""
    store = Store(tmp_path)
    scored(store, evaluate_stage(progress_row("DiCo-S"), stopped(50_000), 0), 90.0, error)
    fid, sfid = scores_over_training(commit_records(tmp_path)).axes[:2]
    expected = [[(50.0, 89.5), (50.0, 90.5)]] if error else []
    assert bars(fid) == expected
    assert not bars(sfid)


def test_a_speed_up_has_the_spread_of_both(tmp_path: Path):
    store = Store(tmp_path)
    timed(store, on_gpu("dico_xl", 32), 300.0, 9.0)
    timed(store, on_gpu("dit_xl_2", 32), 100.0, 4.0)
    _, right = numeric_modes(commit_records(store.root)).axes
    ((low, high),) = ([x for x, _ in bar] for bar in bars(right))
    assert low == pytest.approx(3 - 0.15)
    assert high == pytest.approx(3 + 0.15)


def test_a_palette_gives_every_series_a_colour_of_its_own():
    names = [f"series {number}" for number in range(20)]
    colors = palette(names)
    assert list(colors) == names
    assert len(set(colors.values())) == 20
    assert palette(names[:3]) == {name: colors[name] for name in names[:3]}
    with pytest.raises(ValueError, match="21 series in one figure; the palette has 20"):
        palette([*names, "one more"])


@pytest.mark.parametrize("name", ["table4_score_speed", "figure9_losses", "figure4_locality"])
def test_no_two_series_of_a_figure_share_a_colour(name: str):
    """Of one panel; dashes and marks alone do not tell two series apart."""
    from matplotlib.colors import to_hex

    for axes in FIGURES[name](ReferenceStore()).axes:
        handles, labels = axes.get_legend_handles_labels()
        colors = {}
        for handle, label in zip(handles, labels, strict=True):
            line = handle[0] if isinstance(handle, tuple) else handle
            colors[label] = to_hex(line.get_color())
        assert len(set(colors.values())) == len(labels), colors


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_lines_stand_beside_the_axes_in_the_order_of_the_ends(side: Any):
    drawing, axes = figure(5, 4)
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    ends = [Point(f"row {y}", 10, y, (0, 0, 0)) for y in (0.1, 5.0, 0.0, 5.01, 4.99, 10)]
    label_lines(axes, ends, side)

    drawing.draw_without_rendering()
    frame = axes.get_window_extent()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert set(boxes) == {end.label for end in ends}

    # From the lowest end to the highest, none covers another one or the axes.
    ordered = [boxes[end.label] for end in sorted(ends, key=lambda end: end.y)]
    for lower, upper in pairwise(ordered):
        assert lower.y1 <= upper.y0
    for box in ordered:
        assert box.x1 < frame.x0 if side == "left" else frame.x1 < box.x0


@pytest.mark.parametrize(
    "heights, expected",
    [
        ([0.2, 0.5, 0.9], [0.2, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.5, 0.9], [0.45, 0.55, 0.9]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([0.98, 1.0], [0.9, 1.0]),
        ([], []),
    ],
)
def test_heights_are_moved_as_little_as_a_gap_asks_for(heights: list[float], expected: list[float]):
    assert spread_apart(heights, 0.1) == pytest.approx(expected)


def test_labels_stand_inside_the_panel_and_cover_no_mark_or_label():
    """Labels of points that crowd together and stand at the edge can all be read."""
    drawing, axes = figure(5, 4)
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    places = [(1, 1), (1.4, 1), (9.8, 9.8), (5, 5), (5.1, 5.1), (5, 4.8)]
    points = [Point(f"row {x}", x, y, (0, 0, 0)) for x, y in places]
    label_points(axes, points)

    # Every point has its label.
    drawing.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [point.label for point in points]

    # A label lies in the frame, and covers no label before it and no mark.
    frame = axes.get_window_extent()
    marks = [axes.transData.transform(place) for place in places]
    for number, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*mark) for mark in marks)
