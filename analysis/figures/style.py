"""One look for every figure: seaborn's colour-blind palette, open marks for published numbers, filled marks for ours."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.records.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = ("DiT", "DiCo", "DiG", "DiC", "DiS", "DiM", "U-ViT", "ADM", "DiffuSSM", "DiMSUM")
SIZES = ("DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL")
MARKS = ("o", "s", "^", "D")
PUBLISHED = dict(mfc="white", mew=1.4)
NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **more: Any
) -> tuple[Figure, Any]:
    """A figure and its axes in the common look; sizes in inches."""
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rc = {
        "pdf.fonttype": 42,
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 7.5,
    }
    sns.set_theme(style="whitegrid", palette="colorblind", context="paper", rc=rc)
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **more)


def colour(index: int) -> Any:
    import seaborn as sns

    return sns.color_palette("colorblind")[index]


def family_colour(name: str) -> Any:
    """The colour of the longest family name that a system's name begins with."""
    return colour(
        FAMILIES.index(max((family for family in FAMILIES if name.startswith(family)), key=len))
    )


def errors(axes: Axes, x: Any, y: Any, colour: Any, **errors: Any) -> None:
    """Error bars, `xerr` or `yerr`, on marks that are drawn; none where an error is None."""
    known = {
        name: [math.nan if error is None else error for error in found]
        for name, found in errors.items()
    }
    axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=0.8, zorder=5, **known)


def note(axes: Axes, text: str, bottom: bool = False) -> None:
    """A remark in the panel's right corner, where a reader who sees only the panel needs it."""
    axes.text(
        0.98,
        0.03 if bottom else 0.97,
        text,
        transform=axes.transAxes,
        ha="right",
        va="bottom" if bottom else "top",
        fontsize=7,
        color="0.35",
    )


def below(made: Figure, lines: Sequence[str]) -> None:
    """Remarks under a whole figure, where they cover nothing."""
    if lines:
        made.supxlabel(
            "\n".join(textwrap.fill(line, int(15 * made.get_figwidth())) for line in lines),
            fontsize=7,
            color="0.35",
        )


def save(made: Figure, folder: Path, name: str, about: dict[str, str] | None = None) -> None:
    """PNG and PDF, whole or absent, without dates, so that equal figures are equal files; `about` goes into the PNG's text."""
    for form, metadata in NO_DATE.items():
        with written_whole(folder / f"{name}.{form}") as file:
            made.savefig(
                file,
                format=form,
                dpi=130,
                metadata=metadata | (about or {} if form == "png" else {}),
            )


def png(made: Figure) -> bytes:
    """The figure as it stands on a page."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110, metadata=NO_DATE["png"])
    return buffer.getvalue()
