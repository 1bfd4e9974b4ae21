"""The paper's tables of small or related networks beside the committed records. No torch."""

from __future__ import annotations

from analysis.query import (
    ReferenceStore,
    latest,
    measured_stages,
    reference_selection,
    scores_of,
)
from analysis.tables.caveats import record_caveats
from analysis.tables.conditions import add_conditions
from analysis.tables.ranks import add_ranks
from experiments.declared.protocols import DIGITS, DIGITS_LONG, DIGITS_TEXT
from experiments.declared.systems import SYSTEMS
from experiments.engine.records.store import Record
from experiments.engine.reporting.captioned.binding import binding_sheet
from experiments.engine.reporting.efficiency.counts import counted, difference
from experiments.engine.reporting.efficiency.savings import savings_sheet
from experiments.engine.reporting.lookup import PublishedTable
from experiments.engine.reporting.sheet import GAP, Cell, Column, NoteKind, Sheet, Topic
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.rows import Table
from experiments.engine.specs.selection import Selection
from experiments.related import RELATED_SMALL
from experiments.text_to_image import CHOICES

RECONSTRUCTED = (
    "The authors published no ablation code. Sizes of all rows but DiCo-S, its kernels and "
    "activation, and DiT (iso.) are reconstructed from the paper's two rounded numbers per row. "
    "A match is consistent with the row; it is no proof."
)

# Table 5's models, and the DiT of the same size
DIT_OF = {
    "DiCo-S": "DiT-S/2",
    "DiCo-B": "DiT-B/2",
    "DiCo-L": "DiT-L/2",
    "DiCo-XL": "DiT-XL/2",
}


def ablation_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """Counts, throughput, ranked scores on digits, and GPU results."""
    sheet = main_sheet(reference_selection(table, DIGITS, store), store, store.reference)
    for key, group in (("params", "params, M"), ("gflops", "Gflops")):
        add_difference(sheet, key, group)

    # what the table adds to its counts
    ours: list[Record] = []
    if table.counts_only:
        _add_dit_ratio(sheet, table, store)
    else:
        add_ranks(sheet, table, DIGITS, store)
        ours = add_conditions(sheet, table, 256, store)
        sheet.note(NoteKind.ROWS, RECONSTRUCTED)

    scored = [record for row in table.rows for record in scores_of(row, DIGITS, store)]
    sheet.notes += record_caveats([*latest(measured_stages(table), store), *scored, *ours])
    return sheet


def related_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """Counts beside published counts and scores, of systems that are not trained here."""
    sheet = main_sheet(reference_selection(table, DIGITS, store), store, store.reference)
    for key, group in (("params", "params, M"), ("gflops", "Gflops")):
        add_difference(sheet, key, group)
    sheet.notes += record_caveats(list(latest(measured_stages(table), store)))
    return sheet


def small_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """Counts, speed and scores of small networks of related systems."""
    sheet = main_sheet(_small(table), store, store.reference)
    records = [record for row in table.rows for record in scores_of(row, DIGITS_LONG, store)]
    sheet.notes += record_caveats([*latest(measured_stages(table), store), *records])
    return sheet


def small_savings_sheet(store: ReferenceStore) -> Sheet:
    """What the gates of small networks save, as published, counted and measured."""
    return savings_sheet(_small(RELATED_SMALL), store, store.reference)


def _small(table: Table) -> Selection:
    return Selection(table, table.rows, DIGITS_LONG, range(3), "cpu")


def captioned_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """Counts, scores on captioned digits and published scores of networks that read text."""
    return main_sheet(_captioned(table), store, store.reference)


def words_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """When these networks begin to bind words to places, seed by seed."""
    return binding_sheet(_captioned(table), store.reference)


def _captioned(table: Table) -> Selection:
    return Selection(table, table.rows, DIGITS_TEXT, CHOICES.seeds, "cpu")


def add_difference(sheet: Sheet, key: str, group: str) -> None:
    """Add our difference from the paper's count behind ours."""
    cells = [
        difference(ours, paper)
        for ours, paper in zip(sheet.values(key), sheet.values(f"{key}_paper"), strict=True)
    ]
    column = Column(f"{key}_diff", "diff. %", group, topic=Topic.COUNTS)
    sheet.add_column(column, cells, after=key)


def _add_dit_ratio(sheet: Sheet, table: Table, store: ReferenceStore) -> None:
    """Add Gflops over those of the DiT of the same size, as the paper's Table 5 prints them."""
    gflops = {
        system.label: counted(system, store.reference)[1]
        for system in SYSTEMS
        if system.resolution == 256
    }
    paper = PublishedTable(table, store)
    published = [paper.cell(row, "gflops_ratio_to_dit") for row in table.rows]
    ratios = [
        _ratio(gflops.get(row.label, GAP), gflops.get(DIT_OF.get(row.label, ""), GAP))
        for row in table.rows
    ]
    differences = [difference(ours, theirs) for ours, theirs in zip(ratios, published, strict=True)]

    group = "Gflops over DiT's"
    for key, title, cells in (
        ("dit_ratio_paper", "paper", published),
        ("dit_ratio", "ours", ratios),
        ("dit_ratio_diff", "diff. %", differences),
    ):
        sheet.add_column(Column(key, title, group, topic=Topic.COUNTS), cells)


def _ratio(ours: Cell, dit: Cell) -> Cell:
    if ours.value is None or dit.value is None:
        return Cell()
    return Cell(ours.value / dit.value, None, 3, records=ours.records + dit.records)
