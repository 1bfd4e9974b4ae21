"""Which modules a piece of code imports, found out in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from experiments.engine.records.tree import REPOSITORY

LISTING = """
import sys
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_modules(code: str) -> set[str]:
    """The top-level modules that are loaded after some code ran."""
    script = textwrap.dedent(code) + LISTING
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())
