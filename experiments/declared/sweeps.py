"""Sweeps over how a training is sampled."""

from __future__ import annotations

from dataclasses import replace

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS_HELD_OUT
from experiments.engine.specs.sweeps import Sweep

# The protocol of the digits, with averages of every length. It is trained anew, under an id of its
# own, since the stored averages are part of a recipe.
DIGITS_AVERAGED = replace(
    DIGITS_HELD_OUT,
    name="digits_averaged",
    recipe=replace(DIGITS_HELD_OUT.recipe, power_snapshots=16),
)
SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "digits_guidance",
            TABLE_4.row("DiCo-S"),
            DIGITS_HELD_OUT,
            scales=(1.0, 1.5, 2.0, 3.0),
            samplers=("ddim", "ancestral"),
            steps=(10, 25, 50),
        ),
        Sweep(
            "digits_interval",
            TABLE_4.row("DiCo-S"),
            DIGITS_HELD_OUT,
            scales=(1.5, 2.5),
            intervals=((0, 1000), (0, 500), (200, 800)),
            samplers=("ddim",),
            steps=(25,),
        ),
        Sweep(
            "digits_average",
            TABLE_4.row("DiCo-S"),
            DIGITS_AVERAGED,
            samplers=("ddim",),
            steps=(25,),
            averages=(None, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20),
        ),
    )
}
