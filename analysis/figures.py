"""Figures from records. Every point is a declared row; a row without a record is left out, and the caption says so."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine.spec import Table
from experiments.engine.store import Store
from experiments.protocols import DIGITS, evaluate_stage, timing_stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_against_speed(table: Table, seeds: list[int], store: Store, where: str = "reference") -> Figure:
    """fd_digits of every row (mean and range over seeds) against its throughput relative to the table's first row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", context="paper")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    missing = []
    for row in table.rows:
        timed = store.latest(timing_stage(row, table.baseline, "cpu"), where)
        scored = [record.values["fd_digits"] for seed in seeds if (record := store.latest(evaluate_stage(row, DIGITS, seed), where))]
        if timed is None or not scored:
            missing.append(row.label)
            continue
        mean, speed = statistics.fmean(scored), timed.values["relative"]
        axes.errorbar(speed, mean, yerr=[[mean - min(scored)], [max(scored) - mean]], fmt="o", capsize=2)
        axes.annotate(row.label, (speed, mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel(f"throughput relative to {table.baseline.label}, CPU, 32x32x4, fp32")
    axes.set_ylabel(f"fd_digits, mean and range of {len(seeds)} seeds (lower is better)")
    axes.set_title(f"Table {table.number}'s rows on the digits protocol" + (f" (no record: {', '.join(missing)})" if missing else ""))
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG, without a date, so that equal figures are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
