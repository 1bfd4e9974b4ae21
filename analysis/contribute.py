"""Check a record that another laboratory contributes, and say what it would change.

    python -m analysis.contribute record.json --origin "Example Laboratory"
    python -m analysis.contribute record.json --origin "Example Laboratory" --add

The check covers the schema, the identity of spec, tree, data, features and protocol, and the
values. No path and no name of a person or machine may stand inside; hosts of attempts are left
out. Then the tables are built with and without the record, and every cell that differs is printed.
With --add the record joins results/reference. Exit status: 0 it may enter, 1 it may not, 2 for a
file that is no record.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from analysis.build import attempt
from analysis.contributed import anonymous, problems_with
from analysis.reference import Problem, ReferenceStore
from analysis.tables.paper import SHEETS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.store import FORMAT, Record, read_record, write_record
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.sheet import Sheet

ORIGIN = re.compile(r"[^\W_][\w .,&()-]{1,79}")
Cells = dict[tuple[str, str, str], str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status says whether the record may enter."""
    return run_command(lambda: _check(arguments))


def _check(arguments: list[str] | None) -> int:
    args = _parse(arguments)
    original = read_record(args.record)
    record = anonymous(original)
    store = ReferenceStore(args.results)
    if record != original:
        print("left out: the host of every attempt")

    problems = problems_with({"format": FORMAT} | vars(record), store)
    ours = store.reference.by_id().get(record.id, [])
    if any(anonymous(other).values == record.values for other in ours):
        problems.append("the committed records hold it already")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        return 1

    # Nothing but the origin is added to what was measured.
    contributed = replace(record, provenance=record.provenance | {"origin": args.origin})
    name = f"{record.kind}/{record.id}-{record.utc}-contrib.json"
    for line in changes(contributed, name, store) or ["no cell of any table would change"]:
        print(line)
    if args.add:
        write_record(store.reference.folder / name, contributed)
        print(f"added results/reference/{name}; python -m analysis.build makes the tables anew")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.contribute", description=__doc__)
    parser.add_argument("record", type=Path, help="file of the record")
    parser.add_argument("--origin", required=True, help="name of the laboratory, for the tables")
    parser.add_argument("--add", action="store_true", help="put the record under results/reference")
    parser.add_argument(
        "--results",
        type=Path,
        default=REPOSITORY / "results",
        metavar="DIR",
        help="results folder (default: that of this repository)",
    )
    args = parser.parse_args(arguments)
    if not ORIGIN.fullmatch(args.origin):
        parser.error("--origin takes the name of a laboratory in up to 80 letters and digits")
    return args


def changes(record: Record, name: str, store: ReferenceStore) -> list[str]:
    """Return a line for every cell of a table that a further record changes.

    Args:
        record: the further record.
        name: its file under the folder of the committed records.
        store: the committed records.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(store.reference.folder, root / "reference")
        write_record(root / "reference" / name, record)
        before, after = _cells(store), _cells(ReferenceStore(root))
    lines = []
    for place in sorted(before.keys() | after.keys()):
        old, new = before.get(place, "-"), after.get(place, "-")
        if old != new:
            table, row, column = place
            lines.append(f"{table}, {row}, {column}: {old} -> {new}")
    return lines


def _cells(store: ReferenceStore) -> Cells:
    """Return every cell of every table as it is printed."""
    cells: Cells = {}
    problems: list[Problem] = []
    for name, make in SHEETS.items():
        sheet: Sheet | None = attempt(name, partial(make, store), None, problems)
        if sheet is None:
            continue
        first = sheet.columns[0].key
        for row in sheet.rows:
            label = row[first].text()
            for column, cell in sheet.cells(row):
                cells[name, label, column.key] = cell.text(column.digits)
    return cells


if __name__ == "__main__":
    raise SystemExit(main())
