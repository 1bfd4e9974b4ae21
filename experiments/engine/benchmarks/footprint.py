"""Measure what a whole command costs: seconds, and the memory of all its processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.machine.lifetime import bound

# Seconds between two looks at the memory.
INTERVAL = 0.25


@dataclass(frozen=True)
class Footprint:
    """What a command cost."""

    status: int
    seconds: float
    # The largest sum over the processes of the session.
    peak_bytes: int


def measure_footprint(command: list[str]) -> Footprint:
    """Run a command in a session of its own, and watch the memory of the session."""
    started = time.perf_counter()
    process = subprocess.Popen(bound(command), start_new_session=True)
    samples = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            samples.append(_sum_session_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = process.wait()
    finally:
        process.kill()
        ended.set()
        watcher.join()
    return Footprint(status, time.perf_counter() - started, max(samples))


def measure_start(script: Path, arguments: list[str]) -> tuple[float, bool]:
    """Run a script and tell its seconds, and whether it imported torch."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script.name, *arguments]!r}\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    started = time.perf_counter()
    # Not bound to this process, which would add a start of the interpreter to what is measured.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return time.perf_counter() - started, done.stdout.split()[-1] == "True"


def _sum_session_memory(session: int) -> int:
    """Sum the proportional resident memory of a session; shared pages count once."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in parentheses: state, parent, group, session.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += _read_proportional_memory(stat.parent)
        except OSError:
            # The process has ended meanwhile.
            continue
    return total


def _read_proportional_memory(process: Path) -> int:
    """Read a process's proportional set size in bytes; 0 if the kernel does not show it."""
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
