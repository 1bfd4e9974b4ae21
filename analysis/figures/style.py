"""The common look of all figures: one palette, open marks for published numbers, filled ours."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.declared.families import TITLES
from experiments.declared.systems import family_of_system
from experiments.engine.records.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def family_color(family: str) -> Color:
    """Return the colour of a family such as DiT, which is the same in every figure."""
    return palette(TITLES.values())[family]


def system_color(label: str) -> Color:
    """Return the colour of the family of a compared system such as DiT-XL/2."""
    return family_color(family_of_system(label))


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
