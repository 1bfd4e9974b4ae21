"""Tables 1, 2, 8 and 9 of the paper beside the committed records. No torch.

Their scores at a reduced scale stand apart, one row per trained network: see `families_sheet`.
"""

from __future__ import annotations

from dataclasses import replace

from analysis.query import (
    ReferenceStore,
    latest,
    measured_stages,
    reference_selection,
    scores_of,
)
from analysis.tables.ablations import add_difference
from analysis.tables.caveats import record_caveats
from analysis.tables.conditions import add_conditions
from analysis.tables.speeds import rows_in_modes
from experiments import main_results
from experiments.declared.protocols import DIGITS_WHOLE
from experiments.declared.systems import SYSTEMS
from experiments.engine.reporting.efficiency.counts import (
    Named,
    System,
    counted,
    difference,
    system_notes,
)
from experiments.engine.reporting.lookup import PublishedTable
from experiments.engine.reporting.sheet import GAP, Cell, Column, Note, NoteKind, Sheet, Topic
from experiments.engine.reporting.tables import family_sheet, main_sheet
from experiments.engine.specs.rows import Row, Table, TableName
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import cost_stages, timing_stage

# The protocol under which one small network of every family was trained.
FAMILIES = DIGITS_WHOLE

TABLES = tuple(main_results.TABLES[number] for number in (1, 2, 8, 9))


def systems_sheet(table: Table, resolution: int, store: ReferenceStore) -> Sheet:
    """Every published row, with counts by the counter behind each figure, and GPU results."""
    sheet = main_sheet(reference_selection(table, FAMILIES, store), store, store.reference)
    paper = PublishedTable(table, store)
    by_label = {system.label: system for system in SYSTEMS if system.resolution == resolution}
    known = [by_label.get(paper.row(row)["model"]) for row in table.rows]

    # columns of counts, then of GPU results
    _add_same_counter(sheet, known, store)
    if sheet.has("params_paper"):
        add_difference(sheet, "params", "params, M")
    _compare_all_parameters(sheet, table, known, store)
    own = add_conditions(sheet, table, resolution, store)

    # notes
    sheet.notes += _rounding_notes(table, paper)
    sheet.notes += _system_notes(sheet, table, known, store)
    sheet.note(
        NoteKind.COUNTS,
        "same counter: Gflops in the convention of the tool that gave the published figure. core "
        "counts all systems by one rule.",
    )
    sheet.note(
        NoteKind.GENERAL,
        f"A gap in our columns is what has not been run here{_timed_elsewhere(table, store)}. "
        "The paper's scores are one run each, printed without error, so none is marked best. "
        f"Our scores on {FAMILIES.name}, one row per network, stand in the table of families.",
    )
    sheet.notes += record_caveats([*latest(measured_stages(table), store), *own])
    return sheet


def _add_same_counter(sheet: Sheet, known: list[System | None], store: ReferenceStore) -> None:
    """Add Gflops in the convention of every published figure, and our difference from it."""
    same = [counted(system, store.reference)[1] if system else GAP for system in known]
    sheet.replace_column(replace(sheet.column("gflops"), title="ours, torchprofile"))
    sheet.add_column(
        Column("gflops_same", "ours, same counter", "Gflops", topic=Topic.COUNTS),
        same,
        after="gflops",
    )
    differences = [
        difference(ours, paper)
        for ours, paper in zip(same, sheet.values("gflops_paper"), strict=True)
    ]
    column = Column("gflops_diff", "diff. %", "Gflops", topic=Topic.COUNTS)
    sheet.add_column(column, differences, after="gflops_same")


def _compare_all_parameters(
    sheet: Sheet, table: Table, known: list[System | None], store: ReferenceStore
) -> None:
    """Compare all parameters with the paper's, and name the rows in which not all train."""
    compared = sheet.has("params_diff")
    digits = sheet.column("params").digits
    frozen = []
    for row, system, cells in zip(table.rows, known, sheet.rows, strict=True):
        every = counted(system, store.reference)[0] if system else GAP
        if every.text(digits) != cells["params"].text(digits):
            frozen.append(f"{row.label} {every.text(digits)}")
            if compared:
                cells["params_diff"] = difference(every, cells["params_paper"])

    if frozen:
        compared_words = " diff. compares all parameters." if compared else ""
        sheet.note(
            NoteKind.COUNTS,
            "params: ours are those that train. All parameters, with those that are frozen or "
            "never used, as published figures can count them: "
            f"{', '.join(frozen)}.{compared_words}",
        )


def _rounding_notes(table: Table, paper: PublishedTable) -> list[Note]:
    """A note on rows whose published parameters are rounded to tenths of billions."""
    rounded = [
        row.label
        for row in table.rows
        if cost_stages(row) and paper.row(row).get("params", "").endswith("B")
    ]
    if not rounded:
        return []
    text = (
        f"params of {', '.join(rounded)} are published in billions to one decimal; this rounding "
        "alone can make 5 % of difference."
    )
    return [Note(NoteKind.COUNTS, text)]


def _system_notes(
    sheet: Sheet, table: Table, known: list[System | None], store: ReferenceStore
) -> list[Note]:
    """What the declarations say of the systems, beside their published Gflops."""
    named = [
        Named(row.label, system, cells["gflops_paper"])
        for row, system, cells in zip(table.rows, known, sheet.rows, strict=True)
        if system
    ]
    texts = system_notes(named, SYSTEMS, store.reference)
    return [Note(NoteKind.COUNTS, text) for text in texts]


def _timed_elsewhere(table: Table, store: ReferenceStore) -> str:
    """Rows that were timed, but not in the numeric mode of the table's throughput, in words."""
    # a GPU's modes all stand in the table
    if table is not main_results.TABLE_1 or rows_in_modes("cuda", "forward", store):
        return ""
    labels = [
        row.label
        for row in rows_in_modes("cpu", "forward", store)
        if not store.reference.latest(timing_stage(row, table.baseline, "cpu"))
    ]
    if not labels:
        return ""
    return f"; {', '.join(labels)} were timed with fused attention, see speed_forward"


def families_sheet(store: ReferenceStore) -> Sheet:
    """The scores of every family at a reduced scale, and the rows that it stands for."""
    families = _families()
    rows = tuple(replace(family[0][1], label=label) for label, family in families.items())
    table = replace(TABLES[0], rows=rows, against=TABLES[0].baseline.label)
    sheet = family_sheet(reference_selection(table, FAMILIES, store), store, store.reference)
    sheet.title = f"The families of Tables 1, 2, 8 and 9 on {FAMILIES.name}"

    for cells, family in zip(sheet.rows, families.values(), strict=True):
        cells["stands_for"] = Cell(label=_describe(family))
    records = [record for row in rows for record in scores_of(row, FAMILIES, store)]
    sheet.notes += record_caveats(records)
    return sheet


def _families() -> dict[str, list[tuple[Table, Row]]]:
    """The rows of the tables by the network that is trained for them.

    The first row's label names the network; the table tells two networks of one label apart.
    """
    families: dict[str, list[tuple[Table, Row]]] = {}
    for table in TABLES:
        for run in Selection(table, table.rows, FAMILIES, [0], "cpu").runs:
            families.setdefault(spec_id(run.stage), []).append((table, run.row))

    labelled: dict[str, list[tuple[Table, Row]]] = {}
    for family in families.values():
        table, row = family[0]
        label = f"{row.label} of Table {table.number}" if row.label in labelled else row.label
        labelled[label] = family
    return labelled


def _describe(family: list[tuple[Table, Row]]) -> str:
    """The rows that a network stands for, table by table."""
    labels: dict[TableName, list[str]] = {}
    for table, row in family:
        labels.setdefault(table.number, []).append(row.label)
    return "; ".join(f"Table {number}: {', '.join(names)}" for number, names in labels.items())
