"""Where the committed records come from, as a table."""

from __future__ import annotations

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Cell, Column, Kind, Sheet

COLUMNS = {
    "kind": "kind",
    "status": "status",
    "commit": "commit",
    "changes": "uncommitted changes",
    "device": "device",
    "torch": "torch",
    "python": "python",
    "flags": "precision flags",
}


def provenance_sheet(store: ReferenceStore) -> Sheet:
    """Return a table with one row per kind of record and environment."""
    # Records of one kind and environment are one row.
    environments: dict[tuple[str, ...], list[Record]] = {}
    for record in store.all_records():
        environments.setdefault(tuple(_environment(record).values()), []).append(record)

    columns = [Column("records", "records", digits=0)]
    columns += [Column(key, title, kind=Kind.PROSE) for key, title in COLUMNS.items()]
    sheet = Sheet("Where the committed records come from", columns)
    for values, records in sorted(environments.items()):
        cells = {"records": Cell(float(len(records)), records=tuple(records))}
        cells |= {key: Cell(label=value) for key, value in zip(COLUMNS, values, strict=True)}
        sheet.add_row(cells)
    return sheet


def _environment(record: Record) -> dict[str, str]:
    """Return what the row of a record says, by column."""
    about = record.provenance
    device = about["device"]
    if device == "cpu":
        device = f"{about['cpu']}, {about['cpu_count']} cores"
    flags = [
        f"{name} {'on' if enabled else 'off'}"
        for name, enabled in sorted(about["precision_flags"].items())
    ]
    return {
        "kind": record.kind,
        "status": record.status,
        "commit": (about["commit"] or "unknown")[:12],
        "changes": "yes" if about["dirty"] else "no",
        "device": device,
        "torch": about["torch"],
        "python": about["python"],
        "flags": ", ".join(flags),
    }
