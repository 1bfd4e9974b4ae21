"""Scripts and programs that tests of the command line start in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from experiments.engine.records.tree import REPOSITORY

# A script with one table of three small rows, of which the second fails.
TABLE = """
from dataclasses import replace
from experiments.declared import protocols
from experiments.engine.cli import main
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone

DIGITS = protocols.DIGITS
recipe = replace(DIGITS.recipe, steps={steps}, batch=8, warmup=1)
sampler = replace(DIGITS.sampler, num_steps=2)
protocols.PROTOCOLS["digits"] = replace(DIGITS, recipe=recipe, sampler=sampler, num=20)

tiny = dict(dim=8, depths=(1, 1, 1, 1, 1))
windows = tiny | dict(mixer="window", heads=(1, 1, 1, 1, 1))
good = Row("good", Backbone("dico_s", tiny), {{}}, None)
bad = Row("bad", Backbone("hourglass", windows), dict(mixer_options=dict(window=3)), None)
last = Row("last", Backbone("hourglass", tiny), {{}}, None)
table = Table(4, "tiny", "a test", "table4.csv", ("variant",), rows=(good, bad, last))

if __name__ == "__main__":
    raise SystemExit(main({{4: table}}, protocols.PROTOCOLS, "tiny"))
"""


def call(
    script: Path, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of the suite, with further environment variables, and return what it printed."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | (environment or {}),
        timeout=300,
        check=False,
    )


def write_programs(folder: Path, **programs: str) -> None:
    """Write executable shell scripts, such as a squeue that prints what a test wants."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def hear_interrupts() -> None:
    """Let a background process receive SIGINT, which a shell switches off for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_running(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
