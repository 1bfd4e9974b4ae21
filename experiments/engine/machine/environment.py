"""Environment variables, read in one place. A variable that is empty is not set."""

from __future__ import annotations

import os
from collections.abc import Mapping


def read_variable(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the value of a variable, or None if it is not set.

    Env files, compose files and CI set variables to nothing. Blanks alone count as nothing.
    """
    value = environment.get(name, "")
    return value if value.strip() else None


def read_number(name: str, environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the value of a variable that holds a whole number, or None if it is not set.

    Raises:
        ValueError: in one line, if the variable holds anything else.
    """
    value = read_variable(name, environment)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"environment variable {name} takes a whole number, not {value!r}"
        ) from None
