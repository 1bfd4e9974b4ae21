"""Whose memory in training is predicted: the networks of the paper's tables. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET512
from experiments.engine.reporting.efficiency.memory_sheet import MemoryRow
from experiments.engine.specs.rows import Table
from experiments.engine.specs.spec import Train
from experiments.engine.specs.stages import train_stage

# The number of the table whose networks make images of 512 pixels; the others make 256.
LARGE = 2


def memory_rows(tables: Iterable[Table]) -> list[MemoryRow]:
    """Return the trainings of the tables' networks on latents of ImageNet."""
    rows = []
    for table in tables:
        protocol = IMAGENET512 if table.number == LARGE else IMAGENET256
        for row in table.rows:
            if row.backbone:
                train = train_stage(row, protocol, seed=0)
                batch = (row.method.recipe if row.method else train.recipe).batch
                rows.append(MemoryRow(str(table.number), row.network_label, train, batch))
    return rows


def small_trainings(tables: Iterable[Table]) -> list[Train]:
    """Return the trainings on digits, whose memory a dry run tells at once."""
    small = [table for table in tables if table.number != LARGE]
    return [
        train_stage(row, DIGITS, seed=0) for table in small for row in table.rows if row.backbone
    ]


def in_precision(train: Train, mode: str) -> Train:
    """Return a training in a numeric mode."""
    return replace(train, recipe=replace(train.recipe, precision=mode))
