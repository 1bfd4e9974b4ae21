"""Numbered pieces of work spread over ranks, each result kept on disk until all are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from experiments.engine.machine.system_errors import is_of_files, naming
from experiments.engine.records.files import written_whole
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.heartbeat import RunState
from experiments.engine.runtime.preemption import Preempted, StopRequest

Arrays = dict[str, np.ndarray[Any, Any]]


def compute_pieces(
    context: RunContext, folder: Path, num: int, compute: Callable[[int], Arrays]
) -> Iterator[Arrays]:
    """Compute pieces 0 to num - 1, each rank its share, and yield all of them in order on rank 0.

    The other ranks yield nothing. A restart goes on from the pieces in `folder`, with any number
    of ranks. The caller removes the folder in the end.

    Args:
        context: Whose group shares the work, and whose heartbeat shows how far it is.
        folder: Where results wait until all are there.
        num: How many pieces there are.
        compute: From a piece's number to its arrays.

    Raises:
        Preempted: The job was asked to stop. All ranks agree on it after each round; a piece that
            raises it itself is not kept.
    """
    group = context.group
    started = time.monotonic()
    computed = 0
    for start in range(0, num, group.world_size):
        # A stop within a piece is raised below, where the ranks agree on it.
        piece = start + group.rank
        if piece < num and not _path(folder, piece).exists():
            with suppress(Preempted):
                _keep(folder, piece, compute(piece))
                computed += 1

        # Show the progress of the whole group.
        done = min(start + group.world_size, num)
        if context.heartbeat:
            each = (time.monotonic() - started) / max(1, computed) / group.world_size
            seconds_left = (num - done) * each if computed else None
            context.heartbeat.update(
                state=RunState.EVALUATING, step=done, steps=num, seconds_left=seconds_left
            )

        request = StopRequest(group.maximum(context.requested_stop()))
        if request:
            raise Preempted(request)

    # A damaged result is computed again.
    if group.first:
        for piece in range(num):
            yield _read(folder, piece) or compute(piece)


def count_missing(folder: Path, num: int) -> int:
    """Return how many of the pieces 0 to num - 1 are not in `folder`."""
    return sum(not _path(folder, piece).exists() for piece in range(num))


def _path(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.npz"


def _keep(folder: Path, piece: int, arrays: Arrays) -> None:
    with written_whole(_path(folder, piece)) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(folder: Path, piece: int) -> Arrays | None:
    """Return a result, or None if its file is gone or damaged: the archive has checksums.

    Raises:
        OSError: the file is there and the system does not let it be read.
    """
    path = _path(folder, piece)
    try:
        with naming("read", path), np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (FileNotFoundError, ValueError, EOFError, BadZipFile):
        return None
    except OSError as error:
        # Only a library's own error, without a number, is about the content.
        if is_of_files(error):
            raise
        return None
