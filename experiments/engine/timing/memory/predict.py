"""Trace the memory of declared trainings, and keep the lines under results/predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.engine.numerics.recompute import find_blocks
from experiments.engine.reporting.efficiency.memory import (
    Key,
    Needs,
    network_id,
    read_needs,
    write_needs,
)
from experiments.engine.specs.spec import Train
from experiments.engine.timing.memory.trace import build_meta, trace_needs


def write_all(trainings: Sequence[Train], root: Path, tell: Callable[[str], None]) -> None:
    """Trace what the file below a results folder lacks, and write it after every network.

    Args:
        trainings: each is traced with all activations kept, and with blocks computed again.
        root: the results folder.
        tell: hears what is traced next.
    """
    known = read_needs(root)
    wanted: dict[Key, Needs] = {}
    for train in trainings:
        # A network without blocks has nothing to compute again.
        name, mode = network_id(train.backbone), train.recipe.precision
        keys = [(name, mode, recompute) for recompute in (False, True)]
        wanted |= {key: known[key] for key in keys if key in known}
        lacking = [key for key in keys if key not in wanted]
        if lacking and not find_blocks(build_meta(train)):
            lacking = [key for key in lacking if not key[2]]
        if not lacking:
            continue

        # What is traced is safe before the next network begins.
        tell(f"{train.backbone.name} at {train.data.size}x{train.data.size}, {mode}")
        wanted |= {key: trace_needs(train, recompute=key[2]) for key in lacking}
        rest = {key: needs for key, needs in known.items() if key not in wanted}
        write_needs(root, (wanted | rest).values())
