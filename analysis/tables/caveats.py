"""What the records of a table say about themselves that its reader should know. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Note, NoteKind, Sheet

# the digits of a commit that are printed
COMMIT_DIGITS = 12


def record_caveats(records: Sequence[Record]) -> list[Note]:
    """Notes on the commits, flags, changed trees and warnings of records."""
    if not records:
        return []

    # where the records come from
    count = len({record.name for record in records})
    commits = sorted({commit_of(record) for record in records})
    flags = sorted({describe_flags(record) for record in records})
    texts = [
        f"{count} {plural(count, 'record')} of {plural(len(commits), 'commit')} "
        f"{', '.join(commits)}; "
        f"precision flags in force: {'; '.join(flags)}."
    ]
    dirty = sorted({record.name for record in records if record.provenance["dirty"]})
    if dirty:
        verb = "comes" if len(dirty) == 1 else "come"
        texts.append(
            f"{len(dirty)} of these records {verb} from a tree with uncommitted changes: "
            f"{', '.join(dirty)}."
        )
    notes = [Note(NoteKind.RECORDS, text) for text in texts]

    # scores on other features carry their warnings in the notes of their rows
    inception = [
        record
        for record in records
        if record.kind == "evaluate" and record.spec["features"] == "inception"
    ]
    warnings = [text for record in inception for text in record.values.get("warnings", ())]
    notes += [Note(NoteKind.WARNING, f"Warning: {text}.") for text in dict.fromkeys(warnings)]
    return notes


def add_caveats(sheet: Sheet) -> Sheet:
    """Append the caveats of the records in a sheet's cells to its notes."""
    sheet.notes += record_caveats(sheet.records())
    return sheet


def commit_of(record: Record) -> str:
    """The commit of a record, shortened."""
    commit = record.provenance["commit"]
    return commit[:COMMIT_DIGITS] if commit else "unknown"


def plural(count: int, noun: str) -> str:
    """A noun in the number that fits a count."""
    return noun if count == 1 else f"{noun}s"


def describe_flags(record: Record) -> str:
    """The precision flags that were in force, in words."""
    flags = sorted(record.provenance["precision_flags"].items())
    return " and ".join(f"{name} {'on' if enabled else 'off'}" for name, enabled in flags)
