"""Standard output in any encoding. Standard library only."""

from __future__ import annotations

import io
import sys


def replace_unprintable() -> None:
    """Print a question mark for a character that the encoding of standard output lacks.

    Tables hold ± and names of files hold any byte. Without this a print would raise, and the whole
    table would be lost. Standard error writes such characters as numbers already.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
