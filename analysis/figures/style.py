"""The common look of all figures: one palette, open marks for published numbers, filled ours."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.engine.records.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = ("DiT", "DiCo", "DiG", "DiC", "DiS", "DiM", "U-ViT", "ADM", "DiffuSSM", "DiMSUM")
SIZES = ("DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL")
MARKS = ("o", "s", "^", "D")
OPEN: dict[str, Any] = dict(mfc="white", mew=1.4)  # style of a published number's mark
GREY = "0.35"
# Files of equal figures are equal only without dates and versions.
NO_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
RC = {
    "pdf.fonttype": 42,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
}

Color = tuple[float, float, float]
Style = dict[str, Any]  # keyword arguments of matplotlib


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes in the common look; sizes are in inches."""
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sns.set_theme(style="whitegrid", palette="colorblind", context="paper", rc=RC)
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, **options)


def palette(series: Iterable[str]) -> dict[str, Color]:
    """Return the colour of each series, no two alike.

    A series is what a colour stands for, such as a network; its published and its own numbers share
    the colour and differ in their marks. The first ten colours are safe for the colour-blind.

    Raises:
        ValueError: if there are more series than colours.
    """
    import seaborn as sns

    names = list(dict.fromkeys(series))
    colors = [*sns.color_palette("colorblind"), *sns.color_palette("dark")]
    if len(names) > len(colors):
        raise ValueError(f"{len(names)} series in one figure; the palette has {len(colors)}")
    return dict(zip(names, colors, strict=False))


def family_of(system: str) -> str:
    """Return the longest family name with which a system's name begins."""
    return max((family for family in FAMILIES if system.startswith(family)), key=len)


def family_color(system: str) -> Color:
    """Return the colour of a system's family, which is the same in every figure."""
    return palette(FAMILIES)[family_of(system)]


def errors(axes: Axes, x: Any, y: Any, color: Any, **sizes: Sequence[float | None]) -> None:
    """Draw error bars, `xerr` or `yerr`, on marks that are drawn; none for an error of None."""
    known: Style = {
        name: [math.nan if size is None else size for size in each] for name, each in sizes.items()
    }
    axes.errorbar(x, y, fmt="none", ecolor=color, elinewidth=0.8, zorder=5, **known)


def plain_log(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Set a log scale whose ticks from 10 to 200 are plain numbers."""
    ticks = [10, 20, 50, 100, 200]
    axes.set(**{f"{axis}scale": "log", f"{axis}ticks": ticks, f"{axis}ticklabels": ticks})
    axes.minorticks_off()


def note(axes: Axes, text: str, at: tuple[float, float] = (0.98, 0.97)) -> None:
    """Write a remark into a panel, its upper right corner at a fraction of the panel."""
    axes.text(*at, text, transform=axes.transAxes, ha="right", va="top", fontsize=7, color=GREY)


def mark_gap(axes: Axes, text: str) -> None:
    """Write into an empty panel why it is empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    middle: Style = dict(ha="center", va="center", transform=axes.transAxes)
    axes.text(0.5, 0.5, text, color=GREY, fontsize=7.5, **middle)


def below(drawing: Figure, remarks: Sequence[str]) -> None:
    """Write remarks under a whole figure, where they cover nothing."""
    if not remarks:
        return
    width = int(15 * drawing.get_figwidth())  # characters of this size that a line holds
    lines = [textwrap.fill(remark, width) for remark in remarks]
    drawing.supxlabel("\n".join(lines), fontsize=7, color=GREY)


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


def save(
    drawing: Figure, folder: Path, name: str, description: dict[str, str] | None = None
) -> None:
    """Write a figure as PNG and PDF, each whole or not at all.

    Equal figures are equal files. `description` goes into the PNG's text.
    """
    for form, metadata in NO_METADATA.items():
        if form == "png":
            metadata = metadata | (description or {})
        with written_whole(folder / f"{name}.{form}") as file:
            drawing.savefig(file, format=form, dpi=130, metadata=metadata)


def png(drawing: Figure) -> bytes:
    """Return a figure as the PNG that stands on a page."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110, metadata=NO_METADATA["png"])
    return buffer.getvalue()
