"""Processes that end with the process that started them, however that one ends.

The kernel kills a bound process as soon as its parent is gone, also while it is blocked in C, where
no signal handler and no thread of Python would run. Standard library only.

    python -P experiments/engine/machine/lifetime.py PARENT command ...

turns itself into a command that is bound to the process PARENT.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol, TypeVar

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that the end of the parent sends
GRACE = 5.0  # seconds that a process has to end after SIGTERM
POLL = 0.05  # seconds between two looks at whether it has

# What ends a command: a closed terminal, and a scheduler or a user.
ENDINGS = (signal.SIGHUP, signal.SIGTERM)

# What torchrun sets for each process that it starts.
LAUNCHED = "TORCHELASTIC_RUN_ID"


def bind_to_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends. This outlives an exec, but no fork.

    Args:
        parent: the process that must be the parent; None: whichever it is now. A process whose
            parent has ended already ends here.
    """
    expected = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(128 + signal.SIGKILL)


def bind_to_launcher() -> None:
    """Bind this process to torchrun, if torchrun started it."""
    # Run as a script, this file stands alone and finds no other module.
    from experiments.engine.machine.environment import read_variable

    if read_variable(LAUNCHED):
        bind_to_parent()


def bound(command: Sequence[str]) -> list[str]:
    """Return a command of which the process ends with this one, which must be its parent."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), str(os.getpid()), *command]


def unwind(number: int, _: FrameType | None) -> NoReturn:
    """Handle a signal: exit so that half-written files are removed and children ended."""
    sys.exit(128 + number)


@contextmanager
def unwound() -> Iterator[None]:
    """Unwind on the signals that end a command. One that is ignored, as by nohup, stays ignored."""
    before = {number: signal.getsignal(number) for number in ENDINGS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child(Protocol):
    """A process that was started here, by `subprocess` or by `multiprocessing`."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


ChildType = TypeVar("ChildType", bound=Child)


def end_children(children: Sequence[ChildType], is_over: Callable[[ChildType], bool]) -> None:
    """Ask processes to end, give them time together, and kill those that are left."""
    for child in children:
        child.terminate()

    # A process that is blocked in C hears no SIGTERM.
    end = time.monotonic() + GRACE
    left = [child for child in children if not is_over(child)]
    while left and time.monotonic() < end:
        time.sleep(POLL)
        left = [child for child in left if not is_over(child)]
    for child in left:
        child.kill()


if __name__ == "__main__":
    bind_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
