"""The JSON schema of every kind of record, made from the dataclasses: `python -m analysis.schema`.

The schemas lie in results/schema, one file for each kind. A field with a default may be missing,
because older records were written before it. No torch.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union

from analysis.probes import declared as probes
from experiments.engine.benchmarks import spec as benchmarks
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import FORMAT, SCORES, Record
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs import spec as specs

FOLDER = REPOSITORY / "results" / "schema"
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def _specs_in(module: types.ModuleType) -> list[type]:
    """Return the dataclasses that a module declares, without those that others extend."""
    declared = [cls for cls in vars(module).values() if isinstance(cls, type) and is_dataclass(cls)]
    own = [cls for cls in declared if cls.__module__ == module.__name__]
    return [cls for cls in own if not cls.__subclasses__()]


SPECS = (*typing.get_args(specs.Stage), *_specs_in(benchmarks), *_specs_in(probes))
KINDS: dict[str, type | None] = {cls.__name__.lower(): cls for cls in SPECS} | {SCORES: None}
PLAIN = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
}
# Fields that older records hold and no spec has today.
RETIRED: dict[str, dict[str, Any]] = {"Recipe": {"compile": {"type": "boolean"}}}
Schema = dict[str, Any]


def record_schema(kind: str) -> Schema:
    """Return the schema of the records of a kind.

    Raises:
        ValueError: for an unknown kind; it names the known ones.
    """
    if kind not in KINDS:
        raise ValueError(f"no record is of kind {kind!r}; known: {', '.join(sorted(KINDS))}")

    # Dataclasses inside others become parts, to which the schema refers by name.
    parts: dict[str, Schema] = {}
    whole = _object_of(Record, parts)
    spec = KINDS[kind]
    whole["properties"] |= {
        "format": {"const": FORMAT},
        "id": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
        "kind": {"const": kind},
        "status": {"enum": ["done", "failed"]},
        "utc": {"type": "string", "pattern": "^[0-9]{8}T[0-9]{6}Z$"},
        "spec": {"type": "object"} if spec is None else _schema_of(spec, parts),
    }

    # A file says its format, which no field of a record holds.
    whole["required"] = ["format", *whole["required"]]
    heading = {"$schema": DRAFT, "title": f"A record of kind {kind}"}
    return heading | whole | ({"$defs": parts} if parts else {})


def schema_text(kind: str) -> str:
    """Return the file of a kind's schema."""
    return json.dumps(record_schema(kind), indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write the schema of every kind."""
    for kind in KINDS:
        with written_whole(FOLDER / f"{kind}.json") as file:
            file.write(schema_text(kind).encode())
    print(f"wrote {len(KINDS)} schemas to results/schema")
    return 0


def _object_of(cls: type, parts: dict[str, Schema]) -> Schema:
    """Return the schema of a dataclass; those of its parts join `parts`."""
    hints = typing.get_type_hints(cls)
    required = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING
    ]
    properties = {f.name: _schema_of(hints[f.name], parts) for f in fields(cls)}
    properties |= RETIRED.get(cls.__name__, {})
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema_of(hint: Any, parts: dict[str, Schema]) -> Schema:
    """Return the schema of a field's type."""
    if hint is Any:
        return {}
    if hint in PLAIN:
        return dict(PLAIN[hint])

    # A dataclass is a part that others refer to, and its form names its kind.
    if isinstance(hint, type) and is_dataclass(hint):
        name = hint.__name__
        if name not in parts:
            parts[name] = {}
            part = _object_of(hint, parts)
            part["properties"] = {"kind": {"const": name}} | part["properties"]
            part["required"] = ["kind", *part["required"]]
            parts[name] = part
        return {"$ref": f"#/$defs/{name}"}

    # Unions, tuples and mappings.
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, parts) for argument in arguments]}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0], parts)}
    if origin is tuple:
        items = [_schema_of(argument, parts) for argument in arguments]
        number = len(arguments)
        return {"type": "array", "prefixItems": items, "minItems": number, "maxItems": number}
    assert origin in (dict, Mapping), hint
    return {"type": "object", "additionalProperties": _schema_of(arguments[1], parts)}


def spec_of(form: dict[str, Any], cls: type) -> Any:
    """Return the spec whose full form a record holds; fields that it lacks have their defaults."""
    hints = typing.get_type_hints(cls)
    dropped = {"kind", *RETIRED.get(cls.__name__, {})}
    values = {
        name: _value_of(value, hints[name]) for name, value in form.items() if name not in dropped
    }
    return cls(**values)


def _value_of(value: Any, hint: Any) -> Any:
    if isinstance(value, dict) and "kind" in value:
        candidates = typing.get_args(hint) or (hint,)
        return spec_of(value, next(c for c in candidates if c.__name__ == value["kind"]))
    # Within options, lists and tuples have the same form.
    if isinstance(value, list):
        arguments = [a for a in (typing.get_args(hint) or ()) if a is not type(None)]
        inner = arguments[0] if arguments else Any
        if typing.get_origin(inner) is tuple:
            inner = typing.get_args(inner)[0]
        return tuple(_value_of(item, inner) for item in value)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
