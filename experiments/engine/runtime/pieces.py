"""Numbered pieces of work spread over ranks, each result kept on disk until all are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from experiments.engine.records.files import written_whole
from experiments.engine.runtime import preemption
from experiments.engine.runtime.group import Group
from experiments.engine.runtime.heartbeat import Heartbeat

Result = dict[str, np.ndarray]


def compute_pieces(
    group: Group,
    folder: Path,
    num: int,
    compute: Callable[[int], Result],
    beat: Heartbeat | None = None,
) -> Iterator[Result]:
    """compute(0) to compute(num - 1), in this order, on the first rank; the others compute their share and get nothing.

    A restart goes on from the pieces in `folder`, whatever the number of ranks; the caller removes it in the end. All
    ranks meet after each round, where a job that is asked to stop raises Preempted; a piece that raises it is not kept.
    """
    began, made = time.monotonic(), 0
    for start in range(0, num, group.world_size):
        piece = start + group.rank
        if piece < num and not _path(folder, piece).exists():
            with suppress(preemption.Preempted):  # all ranks stop below, where they agree
                _keep(folder, piece, compute(piece))
                made += 1
        if beat:
            done, each = (
                min(start + group.world_size, num),
                (time.monotonic() - began) / max(1, made) / group.world_size,
            )
            beat.tell(
                state="evaluating",
                step=done,
                steps=num,
                seconds_left=(num - done) * each if made else None,
            )
        if how := group.highest(
            preemption.TAKEN_OVER if beat and beat.taken_over else preemption.requested_stop()
        ):
            raise preemption.Preempted(how)
    if group.first:
        for piece in range(num):
            yield _read(folder, piece) or compute(piece)


def _path(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.npz"


def _keep(folder: Path, piece: int, result: Result) -> None:
    with written_whole(_path(folder, piece)) as file:
        np.savez(file, **result)


def _read(folder: Path, piece: int) -> Result | None:
    """A result, or None where its file is gone or damaged: the archive's own checksums tell."""
    try:
        with np.load(_path(folder, piece), allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, BadZipFile):
        return None
