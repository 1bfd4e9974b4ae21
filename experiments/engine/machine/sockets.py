"""A folder for the sockets of worker processes. Standard library only."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import util

from experiments.engine.machine.environment import read_variable

# multiprocessing puts its sockets under such names into the temporary folder.
FOLDER, SOCKET = "pymp-", "listener-12345678"


def prepare_socket_folder() -> None:
    """Make multiprocessing keep its sockets where they fit.

    The name of a socket has at most 107 bytes. Schedulers give jobs temporary folders with long
    names, and some file systems hold no sockets. Everything else stays in the temporary folder.

    Raises:
        ValueError: if no folder of this machine takes a socket.
    """
    usual = tempfile.gettempdir()
    for folder in _candidates(usual):
        if _takes_sockets(folder):
            break
    else:
        raise ValueError(
            f"no folder takes a socket: the name of {usual} is too long, or its file system holds "
            "no sockets; set TMPDIR to a folder with a short name"
        )

    # multiprocessing makes its folder once per process, in what is the temporary folder then.
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def _candidates(usual: str) -> Iterator[str]:
    yield usual
    runtime = read_variable("XDG_RUNTIME_DIR")
    if runtime:
        yield runtime
    yield from ("/tmp", "/var/tmp", "/dev/shm")


def _takes_sockets(folder: str) -> bool:
    """Return whether a socket can be made in a new folder there, by making one."""
    place = None
    try:
        place = tempfile.mkdtemp(prefix=FOLDER, dir=folder)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(os.path.join(place, SOCKET))
    except OSError:
        return False
    finally:
        if place:
            with suppress(OSError):
                os.unlink(os.path.join(place, SOCKET))
            os.rmdir(place)
    return True
