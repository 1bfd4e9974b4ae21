"""What differs between two results: `python experiments/diff_protocol.py A.json B.json` (Evaluate records, or evaluate.py's --record).

Prints every field of the two manifests that is not equal, with the known size of its effect (on ImageNet's FID) and its source, and
apart from these the fields that one of them should hold and does not. Exit status 0 if the scores may be ranked, 1 if the protocols
differ, 2 for files that are no records.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.engine.cli import Parser, run_command
from experiments.engine.records.manifest import (
    ABSENT,
    NAMED,
    WITHOUT,
    differences,
    effect,
    incomparable,
    of_record,
)
from experiments.engine.records.store import SCORES, Record, read_record

HARDWARE = ("device", "cpu", "world_size", "sample_batch", "commit", "dirty")


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args()
    a, b = (_record(path) for path in (args.a, args.b))
    manifests = [of_record(record.spec, record.values, record.provenance) for record in (a, b)]
    found = _without(differences(*manifests))
    for key, left, right in (one for one in found if ABSENT not in one):
        size, source = effect(key)
        print(
            f"{key}: {left} | {right}"
            + (f"\n    known effect: {size}" if size else "")
            + (f" ({source})" if source else "")
        )
        if key == "measure.guidance.scale":
            print(
                f"    as w in U-ViT's formula, (1 + w) conditional - w null: {left - 1:g} | {right - 1:g}"
            )
    for side, column in ((args.a, 1), (args.b, 2)):
        if silent := [one[0] for one in found if one[column] == ABSENT]:
            print(f"{side.name} does not record {', '.join(silent)}")
    for key in HARDWARE:
        if a.provenance.get(key) != b.provenance.get(key):
            print(f"run on: {key}: {a.provenance.get(key)} | {b.provenance.get(key)}")
    if clash := incomparable(*manifests):
        print(f"the protocols differ in {len(clash)} fields: these scores must not be ranked")
        return 1
    print(
        "one protocol, as far as both records say: these scores may be compared, within their errors"
    )
    return 0


def _without(found: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Fields that a manifest lacks because it has no such option or part are no gaps in it."""
    renamed = tuple(f"{part}." for part in NAMED if any(key == f"{part}.name" for key, *_ in found))
    said = []
    for key, *values in found:
        words = (
            "not set"
            if key.startswith("model.backbone.options.")
            else WITHOUT
            if key.startswith(renamed)
            else ABSENT
        )
        said.append((key, *(words if value == ABSENT else value for value in values)))
    return said


def _record(path: Path) -> Record:
    record = read_record(path)
    if record.kind not in ("evaluate", SCORES) or record.status != "done":
        raise ValueError(
            f"{path.name}: a {record.status} {record.kind} record; only finished evaluate records, and evaluate.py's, have scores"
        )
    return record


if __name__ == "__main__":
    raise SystemExit(main())
