"""One look for all figures, and files without dates: equal figures are equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT = "Blues"


def use_style() -> None:
    """White grid, seaborn's colour-blind-safe palette, fonts embedded; drawing needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", context="paper")
    matplotlib.rcParams.update({"pdf.fonttype": 42, "svg.hashsalt": "figures", "axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7})


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and as PDF."""
    import matplotlib.pyplot as plt

    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None}}
    for suffix, metadata in undated.items():
        with written_whole(folder / f"{name}.{suffix}") as file:
            figure.savefig(file, format=suffix, dpi=130, metadata=metadata)
    plt.close(figure)
