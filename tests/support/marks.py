"""Marks that keep one case of a kind among the fast tests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def slow_after_first(
    values: Iterable[Any], kind: Callable[[Any], Hashable], name: Callable[[Any], str] = str
) -> list[Any]:
    """Return parameters, of which all but the first of each kind are slow.

    Args:
        values: what a test is parametrised with.
        kind: tells which values show the same.
        name: of a value in the test's id.
    """
    seen: set[Hashable] = set()
    parameters = []
    for value in values:
        marks = [pytest.mark.slow] if kind(value) in seen else []
        seen.add(kind(value))
        parameters.append(pytest.param(value, id=name(value), marks=marks))
    return parameters


def family_of(name: str) -> str:
    """Return the family in a registered name or in a case's."""
    return name.partition("_")[0]
