"""Sweeps: one training sampled in many ways, as a declared grid. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Evaluate, Train
from experiments.engine.specs.stages import Protocol, evaluate_stage

NO_STEPS = ("dopri5",)  # samplers that take as many steps as their tolerances need
ALL_TIMES = (0, 1000)


@dataclass(frozen=True)
class Sweep:
    """A grid over how one training is sampled. An empty axis keeps what the protocol declares."""

    name: str
    row: Row
    # Its recipe must store power-function averages if `averages` asks for some.
    protocol: Protocol
    # Guidance scales.
    scales: tuple[float, ...] = ()
    # Times at which guidance acts, as a Sampler says.
    intervals: tuple[tuple[int, int], ...] = ()
    # Names of samplers.
    samplers: tuple[str, ...] = ()
    # Numbers of steps, which decide the number of evaluations.
    steps: tuple[int, ...] = ()
    # Relative widths of the weight average; None is the average by the recipe's decay.
    averages: tuple[float | None, ...] = ()
    # Number of images of a point; None: the protocol's.
    num: int | None = None

    def training(self, seed: int) -> Train:
        """Return the training that all points sample."""
        train = evaluate_stage(self.row, self.protocol, seed).train
        assert isinstance(train, Train)
        return train

    def points(self, seed: int) -> list[Evaluate]:
        """Return the points of the grid, of which each has still to be given a sampling seed.

        Args:
            seed: of the training.

        Raises:
            ValueError: the sampler or the training lacks a parameter of the grid, or the grid has
                a value twice, or seeds serve to choose and to report.
        """
        base = evaluate_stage(self.row, self.protocol, seed)
        base = replace(base, num=self.num or base.num)
        self._require_seeds()

        # A parameter that the grid leaves out keeps the protocol's value.
        points = []
        for scale, interval, name, steps, average in product(
            self.scales or (base.sampler.scale,),
            self.intervals or (base.sampler.interval,),
            self.samplers or (base.sampler.name,),
            self.steps or (base.sampler.num_steps,),
            self.averages or (None,),
        ):
            sampler = replace(
                base.sampler, scale=scale, interval=interval, name=name, num_steps=steps
            )
            point = replace(base, sampler=sampler, average=average)
            self._require_parameters(point)
            points.append(point)
        return points

    def _require_seeds(self) -> None:
        choice, report = self.protocol.selection_seeds, self.protocol.report_seeds
        if not choice or not report or set(choice) & set(report):
            raise ValueError(
                f"sweep {self.name}: protocol {self.protocol.name} needs selection_seeds and "
                "report_seeds that share none, or a score would be chosen on its own noise"
            )
        for axis in ("scales", "intervals", "samplers", "steps", "averages"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"sweep {self.name}: {axis} hold a value twice")

    def _require_parameters(self, point: Evaluate) -> None:
        """Raise ValueError for an axis that does nothing at this point."""
        assert isinstance(point.train, Train)
        sampler, recipe = point.sampler, point.train.recipe
        lacking = ""
        if self.steps and sampler.name in NO_STEPS:
            lacking = f"sampler {sampler.name} has no number of steps: it has tolerances"
        if sampler.scale != 1 and not recipe.label_dropout:
            lacking = "a training without label dropout has no null label to guide by"
        if self.intervals and not any(scale != 1 for scale in self.scales or (sampler.scale,)):
            lacking = "an interval of guidance needs a guidance scale other than 1"
        if point.average is not None and not recipe.power_snapshots:
            lacking = "a length of the average needs a recipe that declares power_snapshots"
        if lacking:
            raise ValueError(f"sweep {self.name}: {lacking}; leave the axis out")
