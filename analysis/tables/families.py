"""Scores on digits, one row per network that was trained for Tables 1, 2, 8 and 9. No torch."""

from __future__ import annotations

from dataclasses import replace

from analysis.query import ReferenceStore, digits_scores, reference_selection
from analysis.tables.caveats import record_caveats
from experiments import main_results
from experiments.declared.protocols import DIGITS
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.reporting.tables import family_sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import spec_id

TABLES = tuple(main_results.TABLES[number] for number in (1, 2, 8, 9))


def families_sheet(store: ReferenceStore) -> Sheet:
    """The scores of every family on digits, and the rows that it stands for."""
    families = _families()
    rows = tuple(family[0][1] for family in families)
    table = replace(TABLES[0], rows=rows, against=TABLES[0].baseline.label)
    sheet = family_sheet(reference_selection(table, DIGITS, store), store, store.reference)
    sheet.title = f"The families of Tables 1, 2, 8 and 9 on {DIGITS.name}"

    for cells, family in zip(sheet.rows, families, strict=True):
        cells["stands_for"] = Cell(label=_describe(family))
    records = [record for row in rows for record in digits_scores(row, store)]
    sheet.notes += record_caveats(records)
    return sheet


def _families() -> list[list[tuple[Table, Row]]]:
    """The rows of the tables by the network that digits trains for them, under unique labels."""
    families: dict[str, list[tuple[Table, Row]]] = {}
    for table in TABLES:
        for run in Selection(table, table.rows, DIGITS, [0], "cpu").runs:
            families.setdefault(spec_id(run.stage), []).append((table, run.row))

    # the first row names the family; two networks of one label are told apart by their tables
    labels: set[str] = set()
    for family in families.values():
        table, row = family[0]
        if row.label in labels:
            family[0] = (table, replace(row, label=f"{row.label}, Table {table.number}"))
        labels.add(family[0][1].label)
    return list(families.values())


def _describe(family: list[tuple[Table, Row]]) -> str:
    """The rows that a network stands for, table by table."""
    labels: dict[int, list[str]] = {}
    for table, row in family:
        labels.setdefault(table.number, []).append(row.label)
    return "; ".join(f"Table {number}: {', '.join(names)}" for number, names in labels.items())
