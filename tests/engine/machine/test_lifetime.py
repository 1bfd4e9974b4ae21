"""Processes that end with their parent, however that one ends and whatever they are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.engine.machine.lifetime import bound, end_children, unwound
from tests.support.commands import is_running

# A parent that starts a bound child, tells its number, and waits.
PARENT = """
import subprocess, sys, time
from experiments.engine.machine.lifetime import bound, unwound
with unwound():
    print(subprocess.Popen(bound([sys.executable, "-c", sys.argv[1]])).pid, flush=True)
    time.sleep(120)
"""
PYTHON = "import time; time.sleep(120)"
# The C library holds the interpreter's lock, so that no handler and no thread can run.
BLOCKED = "import ctypes; ctypes.PyDLL(None).sleep(120)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
BOUND = 20.0  # seconds


def hear_signals() -> None:
    """Let a process hear what a shell's job control or nohup switches off for its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("sign", "child", "status"),
    [
        (signal.SIGHUP, PYTHON, 129),
        (signal.SIGINT, PYTHON, -signal.SIGINT),
        (signal.SIGTERM, BLOCKED, 143),
        (signal.SIGKILL, PYTHON, -signal.SIGKILL),
        (signal.SIGKILL, BLOCKED, -signal.SIGKILL),
        (signal.SIGTERM, DEAF, 143),
    ],
)
def test_no_child_outlives_its_parent(sign: signal.Signals, child: str, status: int):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=hear_signals,
    )

    # The parent prints the id of its child, and is ended.
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.send_signal(sign)
    assert parent.wait(BOUND) == status

    # The child follows.
    end = time.monotonic() + BOUND
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(pid)


def test_a_child_whose_parent_is_gone_does_not_begin():
    command = bound([sys.executable, "-c", "print('begun')"])
    command[3] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, "")


def test_a_deaf_child_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.engine.machine.lifetime.GRACE", 0.2)
    child = subprocess.Popen(
        [sys.executable, "-c", DEAF.replace("time.sleep", "print(1, flush=True); time.sleep")],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline()
    end_children([child], is_over=lambda process: process.poll() is not None)
    assert child.wait(BOUND) == -signal.SIGKILL


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwound():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
