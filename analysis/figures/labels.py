"""Labels that stand beside what they name: points, and lines at their ends. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from analysis.figures.style import GREY, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    drawing.draw_without_rendering()  # fixes the layout, and so where the marks are
    obstacles = [box for point in points for box in _boxes_of(axes, point)]

    # Every place around a point is tried, and the one that covers the least keeps its label.
    for point in points:
        candidates = [(distance, direction) for distance in DISTANCES for direction in DIRECTIONS]
        texts: list[tuple[float, int, Any]] = []
        for distance, direction in candidates:
            text = _beside(axes, point, distance, direction, fontsize)
            covered = _covered(axes, _extent(text), obstacles)
            # Of places that cover equally much, the nearest one is taken.
            texts.append((covered + 0.2 * distance, len(texts), text))
        _, best, label = min(texts)
        for _, number, text in texts:
            if number != best:
                text.remove()
        obstacles.append(_extent(label))


def _beside(
    axes: Axes, point: Point, distance: float, direction: tuple[int, int], fontsize: float
) -> Any:
    right, up = direction
    reach = point.radius + distance
    if right and up:
        reach *= 0.7  # along the diagonal

    # A label far from its mark gets a line that leads to it.
    line: Style | None = None
    if distance >= LEADER:
        line = dict(arrowstyle="-", lw=0.5, color=GREY, shrinkA=0, shrinkB=0)

    label = axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=(reach * right, reach * up),
        textcoords="offset points",
        ha=HORIZONTAL[right],
        va=VERTICAL[up],
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


def _boxes_of(axes: Axes, point: Point) -> list[Any]:
    """Return the boxes, in pixels, of a point's mark and bars."""
    from matplotlib.transforms import Bbox

    to_pixels = axes.transData.transform
    x, y = to_pixels((point.x, point.y))
    radius = point.radius * axes.figure.dpi / 72
    boxes = [Bbox([[x - radius, y - radius], [x + radius, y + radius]])]
    for ends in point.bars:
        (left, low), (right, high) = to_pixels(ends[0]), to_pixels(ends[1])
        boxes.append(Bbox([[left - 2, low - 2], [right + 2, high + 2]]))
    return boxes


def _covered(axes: Axes, box: Any, obstacles: Sequence[Any]) -> float:
    """Return how much of a label's area, in pixels, covers obstacles or lies outside the axes."""
    from matplotlib.transforms import Bbox

    inside = Bbox.intersection(box, axes.get_window_extent())
    outside = box.width * box.height - (inside.width * inside.height if inside else 0)
    overlaps = (Bbox.intersection(box, obstacle) for obstacle in obstacles)
    return 3 * outside + sum(overlap.width * overlap.height for overlap in overlaps if overlap)


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
    drawing.draw_without_rendering()  # fixes the height of the axes

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
