"""Labels that stand beside what they name: points, and lines at their ends. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from analysis.figures.style import GREY, Style

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A mark with the label that stands beside it."""

    label: str
    x: float
    y: float
    color: Any
    # Of the mark, in points.
    radius: float = 3.5
    # Bars through the mark, as (x, y) of both ends, which labels avoid.
    bars: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a label may stand, seen from its mark."""

    # From the mark's edge to the label, in points.
    distance: float
    # 1, -1 or 0: to the right, to the left or neither; above, below or neither.
    right: int
    up: int


# Directions in which a label may stand from its mark, the preferred ones first.
DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
DISTANCES = (1, 6, 12, 20)  # from the mark's edge to the label, in points
LEADER = 12  # distance from which a line joins label and mark, in points
HORIZONTAL = {1: "left", -1: "right", 0: "center"}
VERTICAL = {1: "bottom", -1: "top", 0: "center"}


def label_points(axes: Axes, points: Sequence[Point], fontsize: float = 7) -> None:
    """Write each point's label beside it, where it covers the least of marks, bars and labels.

    Limits and scales of the axes must be set before.
    """
    import numpy as np

    drawing = axes.get_figure(root=True)
    assert drawing is not None
    fix_layout(drawing)
    obstacles = [box for point in points for box in _boxes_of(axes, point)]
    frame = np.array(axes.get_window_extent().extents)

    # Every place around a point is weighed, and the label stands where it covers the least. The
    # text is measured at the first place, since its size is the same at all.
    places = [Place(distance, *direction) for distance in DISTANCES for direction in DIRECTIONS]
    for point in points:
        label = _beside(axes, point, places[0], fontsize)
        size = _extent(label).size
        label.remove()
        boxes = np.array([_box_at(axes, point, place, size) for place in places])
        costs = _covered(boxes, frame, np.array(obstacles))
        # Of places that cover equally much, the nearest one is taken.
        costs += [0.2 * place.distance for place in places]
        label = _beside(axes, point, places[int(costs.argmin())], fontsize)
        obstacles.append(_extent(label).extents)


def _offset(point: Point, place: Place) -> tuple[float, float]:
    """Return the way from a mark to its label, in points."""
    reach = point.radius + place.distance
    if place.right and place.up:
        reach *= 0.7  # along the diagonal
    return reach * place.right, reach * place.up


def _beside(axes: Axes, point: Point, place: Place, fontsize: float) -> Any:
    # A label far from its mark gets a line that leads to it.
    line: Style | None = None
    if place.distance >= LEADER:
        line = dict(arrowstyle="-", lw=0.5, color=GREY, shrinkA=0, shrinkB=0)

    label = axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=_offset(point, place),
        textcoords="offset points",
        ha=HORIZONTAL[place.right],
        va=VERTICAL[place.up],
        fontsize=fontsize,
        color=[0.75 * part for part in point.color],  # darker than the mark, to be read
        arrowprops=line,
    )
    label.set_in_layout(False)  # a label must not move the axes that it was placed in
    return label


def _extent(label: Any) -> Any:
    """Return the box of a label's text, in pixels, without the line that joins it to its mark."""
    from matplotlib.text import Text

    label.update_positions(label.get_figure(root=True).canvas.get_renderer())
    return Text.get_window_extent(label)


def _box_at(axes: Axes, point: Point, place: Place, size: Sequence[float]) -> list[float]:
    """Return left, low, right and high, in pixels, of a text of a size at a place."""
    mark = axes.transData.transform((point.x, point.y))
    lows = []
    # A text ends, begins or is centred where its offset leads.
    for middle, offset, side, length in zip(
        mark, _offset(point, place), (place.right, place.up), size, strict=True
    ):
        lows.append(middle + offset * axes.figure.dpi / 72 + (side - 1) * length / 2)
    return [*lows, lows[0] + size[0], lows[1] + size[1]]


def _boxes_of(axes: Axes, point: Point) -> list[list[float]]:
    """Return the boxes, in pixels, of a point's mark and bars."""
    to_pixels = axes.transData.transform
    x, y = to_pixels((point.x, point.y))
    radius = point.radius * axes.figure.dpi / 72
    boxes = [[x - radius, y - radius, x + radius, y + radius]]
    for ends in point.bars:
        (left, low), (right, high) = to_pixels(ends[0]), to_pixels(ends[1])
        boxes.append([left - 2, low - 2, right + 2, high + 2])
    return boxes


def _covered(boxes: np.ndarray, frame: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """Return how much of each box, in pixels, covers obstacles or lies outside a frame.

    Args:
        boxes: left, low, right and high of N boxes, (N, 4).
        frame: those of the frame, (4,).
        obstacles: those of what is not to be covered, (M, 4).
    """
    import numpy as np

    def common(others: np.ndarray) -> np.ndarray:
        """Return the area that each box shares with each of the others, (N, M)."""
        lows = np.maximum(boxes[:, None, :2], others[None, :, :2])
        highs = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
        return (highs - lows).clip(0).prod(-1)

    outside = (boxes[:, 2:] - boxes[:, :2]).prod(-1) - common(frame[None])[:, 0]
    return 3 * outside + common(obstacles).sum(1)


def fix_layout(drawing: Figure) -> None:
    """Place the axes where the layout of the figure has them now."""
    engine = drawing.get_layout_engine()
    if engine:
        engine.execute(drawing)


LINE_GAP = 1.25  # between the middles of neighbouring labels of lines, in font sizes
ASIDE = 14  # from the axes to the labels of lines, in points


def label_lines(
    axes: Axes, ends: Sequence[Point], side: Literal["left", "right"] = "right", fontsize: float = 7
) -> None:
    """Write each line's label beside the axes, joined to the line's end by a thin line.

    Labels keep the order of the ends and do not overlap. Limits and scales of the axes must be set
    before.

    Args:
        axes: holds the lines.
        ends: label, place and colour of each line's end.
        side: the side of the axes on which the labels stand.
        fontsize: of the labels, in points.
    """
    if not ends:
        return
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    fix_layout(drawing)

    # Heights are fractions of the axes, which keep their meaning if the layout changes.
    box = axes.get_window_extent()
    gap = LINE_GAP * fontsize * axes.figure.dpi / 72 / box.height
    ordered = sorted(ends, key=lambda end: end.y)
    pixels = [axes.transData.transform((end.x, end.y))[1] for end in ordered]
    heights = spread_apart([(pixel - box.y0) / box.height for pixel in pixels], gap)

    # A label faces the axes, and its line leads to the middle of that edge.
    aside = ASIDE * axes.figure.dpi / 72 / box.width
    place, facing, edge = (1 + aside, "left", 0) if side == "right" else (-aside, "right", 1)
    for end, height in zip(ordered, heights, strict=True):
        dark = [0.75 * part for part in end.color]  # darker than the line, to be read
        leader: Style = dict(arrowstyle="-", lw=0.5, shrinkA=1, shrinkB=end.radius)
        axes.annotate(
            end.label,
            (end.x, end.y),
            xytext=(place, height),
            textcoords="axes fraction",
            ha=facing,
            va="center",
            fontsize=fontsize,
            color=dark,
            arrowprops=leader | dict(color=end.color, relpos=(edge, 0.5)),
        )


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights moved as little as possible, so that neighbours keep a gap.

    All of them lie between 0 and 1 if there is room for that.
    """
    # Heights less their share of gaps must not fall; a run that falls is replaced by its mean.
    runs: list[list[float]] = []
    for number, height in enumerate(heights):
        runs.append([height - number * gap])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            last = runs.pop()
            runs[-1].extend(last)
    level = [_mean(run) for run in runs for _ in run]
    apart = [height + number * gap for number, height in enumerate(level)]

    # Those beyond an end are pushed back, together with the ones that they would cover.
    top = 1 - (len(apart) - 1) * gap
    return [
        min(max(height, number * gap), top + number * gap) for number, height in enumerate(apart)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
