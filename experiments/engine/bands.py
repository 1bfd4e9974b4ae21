"""Where the loss of a published recipe should run: the authors' own logs as an early alarm. Standard library only."""

from __future__ import annotations

import csv
from dataclasses import replace
from statistics import fmean

from experiments.engine.spec import Backbone, Diffusion, Recipe, Train
from experiments.engine.store import REPOSITORY

Band = tuple[
    int, int, float, float
]  # first and last step of a window, its mean loss, how far another training's may lie from it
LOGS = REPOSITORY / "results" / "published" / "dico_logs.csv"
SHARE, ERRORS = (
    0.02,
    4,
)  # of the loss, and standard errors of its mean: neighbouring sizes of a network lie 1 to 4 % apart
PUBLISHED = Recipe(steps=0, batch=256)


def bands_of(spec: Train) -> list[Band]:
    """The windows of the authors' log of this training, none where it is not one of theirs: other network, data, objective or recipe."""
    plain = Backbone(spec.backbone.name, dict(input_size=32, in_channels=4, num_classes=1000))
    if (spec.data.name, spec.diffusion, spec.init_from, replace(spec.recipe, steps=0)) != (
        "imagenet256",
        Diffusion(),
        None,
        PUBLISHED,
    ) or spec.backbone != plain:
        return []
    with open(LOGS, newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["model"].lower().replace("-", "_") == spec.backbone.name and row["loss_sd"]
        ]
    return [
        (int(row["first_step"]), int(row["last_step"]), float(row["loss"]), _room(row))
        for row in rows
    ]


def _room(row: dict[str, str]) -> float:
    return SHARE * float(row["loss"]) + ERRORS * float(row["loss_sd"]) / int(row["lines"]) ** 0.5


def departures(bands: list[Band], steps: list[int], losses: list[float]) -> list[str]:
    """A line for each window that is over at the last of `steps` and whose mean loss is out of its band; losses are means up to their steps."""
    found = []
    for first, last, expected, room in bands:
        own = [loss for step, loss in zip(steps, losses, strict=True) if first <= step <= last]
        if own and steps[-1] >= last and abs(fmean(own) - expected) > room:
            found.append(
                f"the loss of steps {first} to {last} is {fmean(own):.4f}, the authors' log has {expected:.4f} ± {room:.4f}: data, latents' scale or recipe differ from theirs"
            )
    return found
