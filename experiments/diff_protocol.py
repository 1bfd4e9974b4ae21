"""Print what differs between two results: `python experiments/diff_protocol.py A.json B.json`.

The files are Evaluate records, or what evaluate.py wrote under --record. This prints every field in
which their manifests are not equal, with the known size of its effect (on ImageNet's FID) and its
source. Fields that one of the manifests should hold and does not are listed apart. The exit status
is 0 if the scores may be ranked, 1 if the protocols differ, 2 for files that are no such records.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.engine.cli import Parser, run_command
from experiments.engine.records.comparison import (
    NAMED,
    Difference,
    Missing,
    differences,
    incomparable,
)
from experiments.engine.records.effects import effect_of
from experiments.engine.records.manifest import record_manifest
from experiments.engine.records.store import SCORES, Record, read_record

HARDWARE = ("device", "cpu", "world_size", "sample_batch", "commit", "dirty")
GUIDANCE_SCALE = "measure.guidance.scale"
NETWORK_OPTIONS = "model.backbone.options."


def main() -> int:
    """Print the differences; the exit status says whether the scores may be ranked."""
    return run_command(_compare_files)


def _compare_files() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args()
    a, b = (_read_scores(path) for path in (args.a, args.b))
    manifests = [record_manifest(record) for record in (a, b)]

    # Fields of which both files say something, then what one of them does not record.
    found = _explain_missing(differences(*manifests))
    for difference in found:
        if difference.is_known:
            print(_describe(difference))
    _print_silent(args.a, [one.field for one in found if one.a is Missing.NOT_RECORDED])
    _print_silent(args.b, [one.field for one in found if one.b is Missing.NOT_RECORDED])

    # Hardware changes no protocol.
    for key in HARDWARE:
        values = [record.provenance.get(key) for record in (a, b)]
        if values[0] != values[1]:
            print(f"run on: {key}: {values[0]} | {values[1]}")

    clashing = incomparable(*manifests)
    if clashing:
        print(f"the protocols differ in {len(clashing)} fields: these scores must not be ranked")
        return 1
    print(
        "one protocol, as far as both records say: "
        "these scores may be compared, within their errors"
    )
    return 0


def _describe(difference: Difference) -> str:
    """Return the lines of a field: both values, and the known effect."""
    effect = effect_of(difference.field)
    text = f"{difference.field}: {difference.a} | {difference.b}"
    if effect.size:
        text += f"\n    known effect: {effect.size}"
    if effect.source:
        text += f" ({effect.source})"
    if difference.field == GUIDANCE_SCALE:
        formula = "as w in U-ViT's formula, (1 + w) conditional - w null"
        text += f"\n    {formula}: {difference.a - 1:g} | {difference.b - 1:g}"
    return text


def _print_silent(path: Path, fields: Sequence[str]) -> None:
    if fields:
        print(f"{path} does not record {', '.join(fields)}")


def _explain_missing(found: Sequence[Difference]) -> list[Difference]:
    """Replace NOT_RECORDED where a manifest lacks a field since it has no such option or part."""
    changed = {difference.field for difference in found}
    renamed = tuple(f"{group}." for group in NAMED if f"{group}.name" in changed)

    def explain(field: str, value: Any) -> Any:
        if value is not Missing.NOT_RECORDED:
            return value
        if field.startswith(NETWORK_OPTIONS):
            return Missing.NOT_SET
        return Missing.WITHOUT if field.startswith(renamed) else value

    return [replace(one, a=explain(one.field, one.a), b=explain(one.field, one.b)) for one in found]


def _read_scores(path: Path) -> Record:
    record = read_record(path)
    if record.kind not in ("evaluate", SCORES) or record.status != "done":
        raise ValueError(
            f"{path}: a {record.status} {record.kind} record; "
            "only finished evaluate records, and evaluate.py's, have scores"
        )
    return record


if __name__ == "__main__":
    raise SystemExit(main())
