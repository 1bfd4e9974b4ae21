"""Files that are whole or absent, and locks between processes. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from experiments.engine.machine.system_errors import naming

SIGNING = 0.05  # seconds that a holder of a lock has to write its name


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `target`, which becomes `target` at the end.

    It is fsynced, then renamed. If anything fails, it is removed and `target` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with naming("write", target, temporary):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
    finally:
        # Whatever kept the file from being written is the error to report.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Digest a whole file, 64 hexadecimal digits."""
    with naming("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed: float, option: str) -> None:
    """Make a folder. Raise ValueError if its disk has less room than `needed` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free; "
            f"name another {option}"
        )


def require_writable(folder: Path, option: str) -> None:
    """Write and remove a file, so that a folder that cannot be written is known before any work.

    Raises:
        ValueError: It cannot; the message advises another `option`.
    """
    probe = folder / ".probe"
    try:
        with written_whole(probe) as file:
            file.write(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder} ({error.strerror}); name another {option}"
        ) from None


def require_folder(folder: Path, option: str) -> None:
    """Raise ValueError if a folder cannot be written, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name another {option}")
    require_writable(folder, option)


def require_target(path: Path, option: str) -> None:
    """Raise ValueError if a file cannot be written, or would replace what is no plain file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file; name another {option}")
    require_writable(path.parent, option)


def sync_folder(folder: Path) -> None:
    """Write a folder's names to disk, so that a renamed file is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems know no such call; they keep names on their server.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, advice: str) -> Any:
    """Return what a JSON file holds; ValueError with its path if it is damaged.

    Args:
        path: the file.
        advice: what to do with a damaged file.
    """
    with naming("read", path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); {advice}") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; another process waits here until it is free.

    The system frees a dead process's lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        with naming("lock", path):
            if not take_lock(file, wait=False):
                say_who_holds(path)
                take_lock(file, wait=True)
        sign_lock(file)
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a file without waiting; yield False if another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        with naming("lock", path):
            mine = take_lock(file, wait=False)
        if mine:
            sign_lock(file)
        yield mine


def sign_lock(file: BinaryIO) -> None:
    """Write into a file that this process has locked who holds it, for those who wait."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    # On a full disk the lock holds all the same.
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(holder).encode())
        file.flush()


def say_who_holds(path: Path) -> None:
    """Say on standard error that this process waits for a lock, and which call holds it."""
    # The holder signs its lock just after it took it.
    time.sleep(SIGNING)
    try:
        holder = json.loads(path.read_bytes())
        age = max(0.0, time.time() - holder["since"])
        held = f"held by process {holder['pid']} on {holder['host']} for {age:.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        held = "held by a process that does not say who it is"
    print(f"waiting for {path}, {held}", file=sys.stderr, flush=True)


def take_lock(file: BinaryIO | int, wait: bool) -> bool:
    """Lock an open file for this process alone; return False if another has it.

    A file system without locks lets every process through.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
