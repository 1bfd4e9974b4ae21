"""This machine's scores beside the committed reference's, and whether they agree. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from experiments.engine.records.comparison import clashes, machines
from experiments.engine.records.score_names import (
    FID_CORRECTED,
    INCEPTION,
    SCORES,
    TABLE_SCORES,
    counted_name,
)
from experiments.engine.records.store import Store
from experiments.engine.reporting.caveats import unrecorded_caveats
from experiments.engine.reporting.lookup import (
    REFERENCE_SEEDS,
    Lookup,
    mean_cell,
    timing_cell,
)
from experiments.engine.reporting.sheet import (
    Cell,
    Column,
    Kind,
    NoteKind,
    Sheet,
    SheetRow,
    Tone,
    Topic,
)
from experiments.engine.reporting.statistics import LEVEL, Spread, agree, pool_spread
from experiments.engine.specs.rows import Row
from experiments.engine.specs.selection import Selection


class Reproduction(Enum):
    """Whether this machine's scores of a row agree with the reference's."""

    YES = "yes"
    NO = "no"
    # the scores were measured under different protocols
    OTHER_PROTOCOL = "other protocol"
    # the reference has no repeated seeds
    SPREAD_UNKNOWN = "spread unknown"
    # one of the two has no record
    UNKNOWN = ""


@dataclass
class Agreement:
    """The evidence for a verdict on every row, by label."""

    here: Lookup
    reference: Lookup
    # the scores that are compared
    scores: Sequence[str]
    # by score, over the reference's seeds and pooled over rows
    spread: dict[str, Spread | None] = field(default_factory=dict)
    # fields of the protocol that differ between the two, those of another machine included
    differing: dict[str, list[str]] = field(default_factory=dict)
    # the same without those that differ from machine to machine
    refusing: dict[str, list[str]] = field(default_factory=dict)
    # the rows that are compared
    compared: set[str] = field(default_factory=set)

    @property
    def comparisons(self) -> int:
        """The number of differences that are looked at together."""
        return len(self.compared) * len(self.scores)


def comparison_sheet(selection: Selection, store: Store) -> Sheet:
    """Scores and relative throughput of both sides, and whether every score agrees."""
    networks = selection.with_rows(selection.networks)
    agreement = _collect(networks, store)

    # one pair of columns per quantity
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        *_pair("relative", "throughput, rel.", 2),
    ]
    for name in agreement.scores:
        inception = selection.protocol.features == INCEPTION
        title = counted_name(SCORES[name], selection.protocol.num) if inception else name
        columns += _pair(name, title, SCORES[name].digits)
    columns.append(Column("reproduced", "reproduced", kind=Kind.PROSE, topic=Topic.SCORES))

    title = f"Table {selection.table.number} on {selection.protocol.name}"
    sheet = Sheet(f"{title}: this machine against the reference", columns)
    for row in networks.rows:
        sheet.add_row(_row_cells(agreement, row))
    _add_notes(sheet, agreement)
    return sheet


def _collect(networks: Selection, store: Store) -> Agreement:
    """Look up both sides, and find the rows that one protocol measured on both."""
    features = networks.protocol.features
    # the corrected FID follows from FID
    scores = [score.key for score in TABLE_SCORES[features] if score is not FID_CORRECTED]
    reference = Lookup(networks.with_seeds(REFERENCE_SEEDS), store.reference)
    agreement = Agreement(Lookup(networks, store.here), reference, scores)

    values = [reference.score_values(row) for row in networks.rows]
    agreement.spread = {name: pool_spread(name, values) for name in scores}
    for row in networks.rows:
        ours, theirs = agreement.here.scored(row), reference.scored(row)
        differing = clashes(ours, theirs)
        refusing = [name for name in differing if not name.startswith(machines(features))]
        agreement.differing[row.label] = differing
        agreement.refusing[row.label] = refusing
        if ours and theirs and not refusing:
            agreement.compared.add(row.label)
    return agreement


def _pair(key: str, group: str, digits: int) -> list[Column]:
    topic = Topic.SPEED if key == "relative" else Topic.SCORES
    return [
        Column(f"{key}_{side}", side, group, digits, topic=topic) for side in ("reference", "here")
    ]


def _row_cells(agreement: Agreement, row: Row) -> SheetRow:
    cells: SheetRow = {"row": Cell(label=row.label)}
    for side, lookup in (("reference", agreement.reference), ("here", agreement.here)):
        cells[f"relative_{side}"] = timing_cell(lookup.timing(row), "relative")
        for name in agreement.scores:
            cells[f"{name}_{side}"] = mean_cell(name, lookup.score_values(row), SCORES[name].digits)
    cells["reproduced"] = _verdict_cell(agreement, row)
    return cells


def _verdict_cell(agreement: Agreement, row: Row) -> Cell:
    verdict, scores_off = judge_row(agreement, row)
    label = ": ".join([verdict.value, ", ".join(scores_off)]) if scores_off else verdict.value
    tones = {Reproduction.YES: Tone.GOOD, Reproduction.NO: Tone.BAD}
    return Cell(label=label, tone=tones.get(verdict, Tone.PLAIN))


def judge_row(agreement: Agreement, row: Row) -> tuple[Reproduction, list[str]]:
    """The verdict on a row, and the scores that do not agree."""
    if agreement.refusing[row.label]:
        return Reproduction.OTHER_PROTOCOL, []
    if row.label not in agreement.compared:
        return Reproduction.UNKNOWN, []
    if None in agreement.spread.values():
        return Reproduction.SPREAD_UNKNOWN, []

    # every score must lie within the reference's noise
    theirs, ours = agreement.reference.score_values(row), agreement.here.score_values(row)
    scores_off = [
        name
        for name in agreement.scores
        if not agree(name, theirs, ours, agreement.spread[name], agreement.comparisons)
    ]
    return (Reproduction.NO, scores_off) if scores_off else (Reproduction.YES, [])


def _add_notes(sheet: Sheet, agreement: Agreement) -> None:
    # what the verdict means
    text = (
        "reproduced: every score lies within the reference's spread over training seeds, pooled "
        f"over the rows (two-sided {1 - LEVEL:.0%} for all {agreement.comparisons} comparisons "
        "together, Bonferroni; fd on a log scale)."
    )
    if not agreement.comparisons:
        text = "No row has scores of this machine and of the reference that can be compared."
    sheet.note(NoteKind.SCORES, text)

    # what was measured otherwise, and whether that refuses a verdict
    advice = "experiments/diff_protocol.py says what that changes."
    refusing = sorted({name for fields in agreement.refusing.values() for name in fields})
    if refusing:
        sheet.note(
            NoteKind.SCORES,
            f"other protocol: no verdict, since the reference was measured with another "
            f"{', '.join(refusing)}. {advice}",
        )
    tolerated = sorted(
        {name for label in agreement.compared for name in agreement.differing[label]}
    )
    if tolerated:
        sheet.note(
            NoteKind.SCORES,
            f"Compared although another machine measures with another {', '.join(tolerated)}. "
            f"{advice}",
        )

    records = [
        record
        for row in agreement.here.selection.rows
        for lookup in (agreement.here, agreement.reference)
        for record in lookup.scored(row)
    ]
    sheet.notes += unrecorded_caveats(records)
