"""How two manifests differ, and whether scores under them may be ranked. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from experiments.engine.records.manifest import (
    Manifest,
    declared,
    record_manifest,
    with_defaults,
)

if TYPE_CHECKING:
    from experiments.engine.records.store import Record

# Groups whose fields depend on their name: under another name they have other fields.
NAMED = ("measure.decoder", "measure.extractor", "measure.reference")
# Groups that a manifest lacks if the run did without them.
OPTIONAL = (
    "measure.guidance.classifier",
    "measure.upsampling",
    "model.classifier",
    "model.upsampler",
    "model.init_from",
    "model.sha256",
)
# Bears on density and coverage alone, which no table shows.
DENSITY_BALL = "measure.neighbours.density_ball"
# Follows from the sampler, and under an adaptive one from the network.
EVALUATIONS = "measure.nfe"


class Missing(Enum):
    """Why a manifest has no value in a field that another one has."""

    NOT_RECORDED = "not recorded"
    # The run did without the option or part.
    WITHOUT = "without"
    # An option of the network was left at its default.
    NOT_SET = "not set"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Difference:
    """A field in which two manifests are not equal, with the values of both."""

    field: str
    a: Any
    b: Any

    @property
    def is_known(self) -> bool:
        """Return whether both manifests say something of the field."""
        return Missing.NOT_RECORDED not in (self.a, self.b)


def differences(a: Manifest, b: Manifest) -> list[Difference]:
    """Return every field in which two manifests are not equal.

    The value is Missing.NOT_RECORDED where only the other manifest has the field. A group of
    OPTIONAL that only one manifest has is one field, and the other value is Missing.WITHOUT.
    """
    left = _flat_fields(a)
    right = _flat_fields(b)
    for group in OPTIONAL:
        _fold_group(group, left, right)
        _fold_group(group, right, left)

    found = []
    for field in dict.fromkeys([*left, *right]):
        values = [side.get(field, Missing.NOT_RECORDED) for side in (left, right)]
        if values[0] != values[1]:
            found.append(Difference(field, *values))
    return found


def incomparable(a: Manifest, b: Manifest) -> list[str]:
    """Return the fields in which the protocols of two manifests are known to differ.

    These are fields of `measure`, and the key of the weights. Scores under two protocols must not
    be ranked.
    """
    return [
        difference.field
        for difference in differences(a, b)
        if difference.is_known
        and difference.field.startswith(("measure.", "model.key"))
        and difference.field != EVALUATIONS
    ]


def clashes(records: Sequence[Record], base: Sequence[Record]) -> list[str]:
    """Return the fields in which any record's protocol is known to differ from that of base[0].

    Fields stand without `measure.`. Those that bear on no score of a table are left out. Without a
    base there are none.
    """
    if not base:
        return []
    first = record_manifest(base[0])
    fields: set[str] = set()
    for record in records:
        fields |= set(incomparable(first, record_manifest(record)))
    return sorted(field.removeprefix("measure.") for field in fields - {DENSITY_BALL})


def fields_of_some(records: Sequence[Record]) -> list[str]:
    """Return the fields that were found for some records and not for others.

    Fields stand without `measure.`. Fields that specs declare are left out, for all records hold
    them; so are the fields of a group whose name differs.
    """
    if not records:
        return []
    manifests = [record_manifest(record) for record in records]
    other_fields = tuple(
        f"{group.removeprefix('measure.')}." for group in NAMED if _names_differ(group, manifests)
    )
    held = [_found_fields(whole, record) for whole, record in zip(manifests, records, strict=True)]
    everywhere = held[0].intersection(*held)
    partial = held[0].union(*held) - everywhere
    return sorted(field for field in partial if not field.startswith(other_fields))


def machines(features: str) -> tuple[str, ...]:
    """Return how the fields begin that differ from machine to machine.

    A reproduction is compared across them. Each machine trains the small classifiers itself.
    """
    return ("versions.",) if features == "inception" else ("versions.", "extractor.sha256")


def _flat_fields(whole: Manifest) -> dict[str, Any]:
    """Return the fields of a manifest by their whole names, the hash and empty options apart."""
    fields = _flatten(with_defaults(whole))
    return {
        field: value
        for field, value in fields.items()
        if field != "hash" and (field not in OPTIONAL or value is not None)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            fields |= _flatten(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def _fold_group(group: str, side: dict[str, Any], other: dict[str, Any]) -> None:
    """Make a group that only `side` has into one field of `side`, and tell `other` so."""
    own = [field for field in side if field.startswith(group)]
    if not own or any(field.startswith(group) for field in other):
        return
    texts = []
    for field in own:
        name = field.removeprefix(group).lstrip("._")
        texts.append(f"{name} {side.pop(field)}".strip())
    side[group] = ", ".join(texts)
    other[group] = Missing.WITHOUT


def _names_differ(group: str, manifests: Sequence[Manifest]) -> bool:
    key = group.removeprefix("measure.")
    return len({whole["measure"].get(key, {}).get("name") for whole in manifests}) > 1


def _found_fields(whole: Manifest, record: Record) -> set[str]:
    """Return the fields of a manifest that the record's spec does not declare."""
    fields = set(_flatten(whole["measure"])) - set(_flatten(declared(record.spec)["measure"]))
    return fields | {"model.key"} if "key" in whole["model"] else fields
