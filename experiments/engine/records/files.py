"""Files that are whole or absent. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `target`, fsynced and renamed to it at the end; removed if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk: a file that was renamed into it is there after a power cut only then."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(
            OSError
        ):  # some network file systems know no such call; they keep names on their server
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; another process waits here until it is free. The system frees a dead process's lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        take_lock(file, wait=True)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """As `locked`, without waiting: False where another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield take_lock(file, wait=False)


def take_lock(file: BinaryIO, wait: bool) -> bool:
    """Lock an open file for this process alone; False where another has it. A file system without locks lets everyone through."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
