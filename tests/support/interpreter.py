"""Triton's interpreter, for tests of Triton kernels on machines without a GPU."""

import os
import re
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")


def passes(file: str, chosen: str, count: int) -> None:
    """Run the `count` tests of a file that `-k chosen` selects, in the interpreter.

    Triton reads the switch when it is imported, so the tests need a process of their own.
    """
    pytest.importorskip("triton")
    options = ["-n", "0", "-p", "no:cacheprovider", file, "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )

    # All of them ran, and none was skipped.
    report = done.stdout[-3000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert re.search(rf"\b{count} passed", done.stdout), report
