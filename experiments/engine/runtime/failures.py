"""What becomes of a group when one of its processes fails: every rank ends, with the first error.

A rank that fails leaves `rank-<k>.error` in the run's folder before its connections close. The
other ranks, whose collectives then break or wait in vain, find the file and end too.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from experiments.engine.records.files import written_whole
from experiments.engine.runtime.group import Group, one_line

POLL = 1.0  # seconds between two looks at the other ranks' errors
GRACE = 10.0  # seconds from another rank's error to the end of this process


@dataclass(frozen=True)
class RankError:
    """An error that a rank reported."""

    rank: int
    # Type and first line of the error.
    error: str
    # Unix time of the report.
    at: float

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.error}"


class RankLost(Exception):
    """Another rank ended without a word: it was killed, or its node died.

    This is no result of the stage: another attempt can finish it.
    """


def clear_errors(folder: Path) -> None:
    """Remove the errors of earlier attempts. Rank 0 does so before the others start."""
    for path in folder.glob("rank-*.error"):
        path.unlink()


def report_error(folder: Path, group: Group, error: str) -> None:
    """Leave this rank's error where the other ranks look for it."""
    if group.world_size == 1:
        return
    entry = {"rank": group.rank, "error": error, "at": time.time()}
    with suppress(OSError), written_whole(folder / f"rank-{group.rank}.error") as file:
        file.write(json.dumps(entry).encode())


def first_error(folder: Path) -> RankError | None:
    """Return the earliest error that a rank reported: the later ones follow from it."""
    errors = []
    for path in folder.glob("rank-*.error"):
        with suppress(OSError, ValueError):
            errors.append(RankError(**json.loads(path.read_bytes())))
    return min(errors, key=lambda error: error.at, default=None)


def explain_failure(folder: Path, group: Group, failure: Exception) -> str:
    """Return in one line why the run fails: this rank's error, or the error that caused it.

    Raises:
        RankLost: The connection to the other ranks broke, and none of them reported an error.
    """
    if group.world_size == 1:
        return one_line(failure)

    # An error of this rank's own is reported; a broken connection has its cause on another rank.
    is_broken_connection = _is_broken_connection(failure)
    if not is_broken_connection:
        report_error(folder, group, one_line(failure))

    # The cause may not be on disk yet.
    end = time.monotonic() + GRACE
    error = first_error(folder)
    while error is None and is_broken_connection and time.monotonic() < end:
        time.sleep(0.1)
        error = first_error(folder)

    if error:
        return str(error)
    if is_broken_connection:
        raise RankLost(f"rank {group.rank} lost another rank ({_without_location(failure)})")
    return f"rank {group.rank}: {one_line(failure)}"


def _is_broken_connection(failure: Exception) -> bool:
    if isinstance(failure, dist.DistError):
        return True
    message = str(failure).lower()
    return isinstance(failure, RuntimeError) and ("gloo" in message or "nccl" in message)


def _without_location(failure: Exception) -> str:
    """Return the first sentence of a library's message, without its file and line."""
    text = re.sub(r"\[\S*\.cc:\d+\] ", "", str(failure))
    return text.partition(". ")[0].splitlines()[0]


class FailureWatch:
    """Watches for errors of other ranks while this rank works, and ends this process then.

    A rank that waits in a collective cannot notice by itself. A rank whose own work ends first
    is left alone. Rank 0 calls `tell` with the error before it ends, and ends first.
    """

    def __init__(self, group: Group, folder: Path, tell: Callable[[str], object] | None = None):
        self.group = group
        self.folder = folder
        self.tell = tell
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> FailureWatch:
        if self.group.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        # A thread that still runs while the interpreter ends can abort the process.
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        grace = GRACE if self.group.first else 2 * GRACE
        while not self._is_over.wait(POLL):
            error = first_error(self.folder)
            if error and not self._is_over.wait(grace):
                if self.tell:
                    self.tell(str(error))
                os._exit(1)
