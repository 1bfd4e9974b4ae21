"""Triton's interpreter, for the tests of Triton kernels where there is no GPU."""

import os
import re
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")


def passes(file: str, chosen: str, count: int) -> None:
    """Run the `count` tests of a file that an expression for -k chooses, in a process of its own: Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        chosen,
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and re.search(rf"\b{count} passed", done.stdout), (
        done.stdout[-3000:] + done.stderr[-2000:]
    )
