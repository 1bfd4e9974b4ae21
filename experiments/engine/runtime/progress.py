"""How far a stage of work has come. Standard library only, so that a display needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    # Steps of a training, or images of a sampling, that are done.
    step: int
    # Steps or images when the stage ends.
    total: int
    # Images per second.
    rate: float
    # Mean training loss since the last report. Sampling has none.
    loss: float | None = None


Report = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Do nothing: the report of a stage whose progress nobody watches."""
