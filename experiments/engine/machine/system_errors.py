"""Errors of the operating system in one line: operation, path, reason, and what would help."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a user can do about a reason. A reason that is not here gets no advice.
ADVICE = {
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free space within the quota",
    errno.EROFS: "its file system can only be read: name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOENT: "check the path",
    errno.EISDIR: "a folder is there: name a file, or remove it",
    errno.ENOTDIR: "a file stands where a folder is needed: name another place, or remove it",
    errno.EEXIST: "something else stands there: name another place, or remove it",
    errno.ENAMETOOLONG: "shorten the path",
    errno.ELOOP: "its links lead in a circle: repair them",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many open files: close other programs",
    errno.ENOMEM: "free memory",
    errno.EIO: "the disk or the network failed: check it, then run the command again",
    errno.ESTALE: "the network file system lost it: run the command again",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}
# The operation by the Python function that failed, where nothing else names it.
OPERATIONS = {
    "mkdir": "make the folder",
    "makedirs": "make the folder",
    "unlink": "remove",
    "rmdir": "remove",
    "rmtree": "remove",
    "rename": "rename",
    "replace": "rename",
    "iterdir": "list the folder",
    "listdir": "list the folder",
    "stat": "look at",
    "disk_usage": "measure the disk of",
    "touch": "write",
}
# Reasons that lie with the machine and not with one file.
OF_THE_MACHINE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
)


@contextmanager
def naming(operation: str, path: Path, *aliases: Path) -> Iterator[None]:
    """Let every OSError about one file say what was done, and with which path.

    Errors about other files, errors of the network and errors that say so already stay as they are.

    Args:
        operation: a verb, such as "write".
        path: the file as the user knows it.
        aliases: other paths of the file, such as a temporary one.
    """
    try:
        yield
    except OSError as error:
        own = (None, *map(os.fspath, (path, *aliases)))
        if is_of_files(error) and error.filename in own and not hasattr(error, "operation"):
            error.operation = operation  # type: ignore[attr-defined]
            error.path = path  # type: ignore[attr-defined]
        raise


def explain(error: OSError, operation: str = "", folder: Path | None = None) -> str:
    """Return in one line what could not be done, with which path, why, and what would help.

    Args:
        error: the error.
        operation: what was done, where the caller knows better than the error.
        folder: with what, likewise.
    """
    # A library's own error is a sentence already.
    if error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    operation = operation or _operation(error)
    path = folder or getattr(error, "path", error.filename)
    reason = " ".join(str(error.strerror or os.strerror(error.errno)).split())
    if path is None or isinstance(path, int):
        return _with_advice(f"cannot {operation}: {reason}", _advice(error, None))

    text = f"cannot {operation} {_show(path)}"
    if error.filename2 is not None and path == error.filename:
        text += f" to {_show(error.filename2)}"
    return _with_advice(f"{text}: {reason}", _advice(error, Path(os.fsdecode(path))))


def is_of_files(error: OSError) -> bool:
    """Tell whether the system refused a file, and not a network or a library its content."""
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)


def require_file(path: Path, kind: str, advice: str) -> None:
    """Raise ValueError unless a path is a file, and say what is there instead.

    Args:
        path: the path.
        kind: what it should be, such as "checkpoint".
        advice: what to do if nothing is there.
    """
    with naming("look at", path):
        if path.is_file():
            return
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, and no {kind}; {advice}")
        if path.is_symlink():
            raise ValueError(
                f"{path}: no such {kind}: its link leads to {os.readlink(path)}, which is not "
                "there; repair the link"
            )
        if path.exists():
            raise ValueError(f"{path}: is a pipe, socket or device, and no {kind}; {advice}")
    raise ValueError(f"{path}: no such {kind}; {advice}")


def _operation(error: OSError) -> str:
    """Return what failed: as `naming` says, else by the function that raised the error."""
    known = getattr(error, "operation", None)
    if known:
        return str(known)
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    for name in reversed(names):
        if name in OPERATIONS:
            return OPERATIONS[name]
    if error.filename is not None:
        return "open"
    return f"go on in {names[-1]}" if names else "go on"


def _advice(error: OSError, path: Path | None) -> str:
    """Return what would help with an error, or ''."""
    if error.errno == errno.ENOENT and path is not None and os.path.islink(path):
        return f"its link leads to {os.readlink(path)}, which is not there: repair the link"
    return ADVICE.get(error.errno or 0, "")


def _with_advice(text: str, advice: str) -> str:
    return f"{text}; {advice}" if advice else text


def _show(path: object) -> str:
    """Return a path for people, on one line: bytes that are no UTF-8 as \\xNN."""
    name = os.fsencode(path).decode(errors="backslashreplace")  # type: ignore[arg-type]
    return name.replace("\n", "\\n")
