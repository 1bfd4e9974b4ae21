"""Where the loss of a published recipe should run: the authors' own logs as an early alarm.

Standard library only.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Backbone, Diffusion, Recipe, Train

LOGS = REPOSITORY / "results" / "published" / "dico_logs.csv"
SHARE = 0.02  # of the loss: networks of neighbouring sizes lie 1 to 4 % apart
ERRORS = 4  # standard errors of the authors' mean
PUBLISHED = Recipe(steps=0, batch=256)


@dataclass(frozen=True)
class Band:
    """A window of the authors' log."""

    # First and last step of the window.
    first: int
    last: int
    # Mean loss in the window.
    loss: float
    # How far the mean loss of another training may lie from it.
    tolerance: float


def bands_of(spec: Train) -> list[Band]:
    """Return the windows of the authors' log of this training.

    There are none for a training that is not theirs: another network, data, objective or recipe.
    """
    published = Backbone(spec.backbone.name, dict(input_size=32, in_channels=4, num_classes=1000))
    is_published = (
        spec.backbone == published
        and spec.data.name == "imagenet256"
        and spec.diffusion == Diffusion()
        and spec.init_from is None
        and replace(spec.recipe, steps=0) == PUBLISHED
    )
    if not is_published:
        return []

    with open(LOGS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [_band(row) for row in rows if row["loss_sd"] and _name(row) == spec.backbone.name]


def _name(row: dict[str, str]) -> str:
    return row["model"].lower().replace("-", "_")


def _band(row: dict[str, str]) -> Band:
    loss = float(row["loss"])
    error = float(row["loss_sd"]) / int(row["lines"]) ** 0.5
    return Band(int(row["first_step"]), int(row["last_step"]), loss, SHARE * loss + ERRORS * error)


def departures(bands: Sequence[Band], steps: Sequence[int], losses: Sequence[float]) -> list[str]:
    """Return a line for each window that is over and whose mean loss is out of its band.

    Args:
        bands: The windows.
        steps: Steps at which the loss was logged.
        losses: Mean loss up to each of these steps.
    """
    lines = []
    for band in bands:
        # The window's losses are those that were logged inside it.
        own = [
            loss
            for step, loss in zip(steps, losses, strict=True)
            if band.first <= step <= band.last
        ]

        # A window that is not over yet says nothing.
        is_over = bool(own) and steps[-1] >= band.last
        if is_over and abs(fmean(own) - band.loss) > band.tolerance:
            lines.append(
                f"the loss of steps {band.first} to {band.last} is {fmean(own):.4f}, "
                f"the authors' log has {band.loss:.4f} ± {band.tolerance:.4f}: "
                "data, latents' scale or recipe differ from theirs"
            )

    return lines
