"""The canonical form of a spec, and the content id that names it. Standard library only.

The form leaves out every field that has its default, so a field added later keeps old ids valid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, ClassVar, Protocol

# Of a field that no form holds while it has its default. Forms then equal those of older records.
UNSAID = {"unsaid": True}


class Spec(Protocol):
    """Any frozen dataclass whose content names a record, of whatever module."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def canonical(value: Any, full: bool = False) -> Any:
    """Return the JSON-ready form of a spec.

    Args:
        value: a spec, or a part of one.
        full: whether fields that have their defaults are kept.

    Raises:
        TypeError: for what has no stable form.
    """
    if is_dataclass(value):
        form = {"kind": type(value).__name__}
        for f in fields(value):
            content = getattr(value, f.name)
            is_default = content == _default(f)
            if not is_default or (full and not f.metadata.get("unsaid")):
                form[f.name] = canonical(content, full)
        return form

    # Containers are walked, and plain values are kept as they are.
    if isinstance(value, dict):
        return {str(key): canonical(item, full) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [canonical(item, full) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} has no canonical form")


def spec_id(spec: Spec) -> str:
    """Return the 16 hexadecimal digits that name a spec by its content."""
    text = json.dumps(canonical(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _default(f: Field[Any]) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING
