"""The plot of a sweep: score against network evaluations per image."""

from __future__ import annotations

import math
from pathlib import Path

from experiments.engine.records.files import written_whole
from experiments.engine.records.score_names import distance_score
from experiments.engine.reporting.sweeps.choice import Point, name_average


def plot_sweep(title: str, points: list[Point], chosen: Point | None, path: Path) -> None:
    """Draw a line for each sampler and average over the points that are scored.

    Args:
        title: of the plot.
        points: the grid.
        chosen: the best point, which gets a ring; None: none is chosen yet.
        path: the PNG.

    Raises:
        ValueError: no point is scored yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    score = distance_score(points[0].stage.features)
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        sampler = point.stage.sampler
        name = f"{sampler.name}, scale {sampler.scale:g}, average {name_average(point.stage)}"
        if not math.isnan(point.score(score)):
            series.setdefault(name, []).append((point.evaluations, point.score(score)))
    if not series:
        raise ValueError(f"{title}: no point is scored yet, so there is nothing to plot")

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, places in series.items():
        axes.plot(*zip(*sorted(places), strict=True), marker="o", label=name)
    if chosen is not None:
        place = (chosen.evaluations, chosen.score(score))
        axes.plot(*place, "o", ms=14, mfc="none", mec="black", label="best on the selection seeds")
    axes.set(
        title=title,
        xlabel="network evaluations per image",
        ylabel=f"{score.name} on the selection seeds",
    )
    axes.legend(fontsize=7)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
