"""What alignment changes: each row with it beside the same row without, paired by seed. No torch.

A difference is of one training seed, from which both start with equal weights and see equal draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from experiments.engine.records.score_names import TABLE_SCORES, Better, score_title
from experiments.engine.records.store import Record, RecordFolder
from experiments.engine.reporting.lookup import Lookup, scored_run
from experiments.engine.reporting.sheet import GAP, Cell, Column, Kind, NoteKind, Sheet, Topic
from experiments.engine.specs.rows import Row
from experiments.engine.specs.selection import Run, Selection

PAIRED = (
    "A change is the mean over training seeds of aligned over plain, less 1, with its standard "
    "error; below zero, alignment is better."
)
COST = (
    "Cost per step: seconds per step of the aligned training over those of the plain one, as both "
    "records tell them. Only trainings on the same machine and processor are set against each "
    "other; trainings beside them on the same cores disturb it."
)
# What tells a machine in a record's provenance.
MACHINE = ("device", "cpu", "gpu", "world_size")


def has_pairs(selection: Selection) -> bool:
    """Return whether rows with and without alignment are selected."""
    return any(True for _ in find_pairs(selection))


def find_pairs(selection: Selection) -> Iterator[tuple[Row, Row]]:
    """Yield every aligned row after its plain one, if both are selected."""
    for row in selection.networks:
        if row.alignment is None:
            continue
        for plain in selection.networks:
            renamed = replace(row, label=plain.label, note=plain.note, published=plain.published)
            if replace(renamed, alignment=None) == plain:
                yield plain, row


def alignment_sheet(selection: Selection, folder: RecordFolder) -> Sheet:
    """Return the scores of each pair, how alignment changes them, and what a step of it costs."""
    protocol = selection.protocol
    scores = [score for score in TABLE_SCORES[protocol.features] if score.better is Better.LOWER]

    # Of every score, both sides and the change.
    columns = [Column("row", "network", kind=Kind.PROSE)]
    for score in scores:
        for key, title in (("plain", "plain"), ("aligned", "aligned"), ("change", "change, %")):
            digits = 1 if key == "change" else score.digits
            group = score_title(score, protocol.features, protocol.num)
            name = f"{score.key}_{key}"
            columns.append(Column(name, title, group, digits, topic=Topic.SCORES))
    columns.append(Column("cost", "cost per step", digits=2, topic=Topic.SPEED))

    # A seed counts once both of its trainings are scored.
    sheet = Sheet(f"What alignment changes on {protocol.name}", columns)
    lookup = Lookup(selection, folder)
    for plain, aligned in find_pairs(selection):
        pairs = list(zip(selection.runs_of(plain), selection.runs_of(aligned), strict=True))
        cells = {"row": Cell(label=plain.label), "cost": _cost(pairs, lookup.folder)}
        for score in scores:
            cells |= _scores(score.key, pairs, lookup.folder)
        sheet.add_row(cells)

    sheet.note(NoteKind.SCORES, PAIRED)
    sheet.note(NoteKind.SPEED, COST)
    return sheet


def _scores(name: str, pairs: list[tuple[Run, Run]], folder: RecordFolder) -> dict[str, Cell]:
    """Return the cells of one score, of the seeds that both sides have."""
    found = [(scored_run(plain, folder), scored_run(aligned, folder)) for plain, aligned in pairs]
    both = [
        (plain, aligned)
        for plain, aligned in found
        if plain and aligned and name in plain.values and name in aligned.values
    ]
    if not both:
        return {}

    # The change is that of each seed.
    plain = [record.values[name] for record, _ in both]
    aligned = [record.values[name] for _, record in both]
    changes = [100 * (b / a - 1) for a, b in zip(plain, aligned, strict=True)]
    records = tuple(record for pair in both for record in pair)
    return {
        f"{name}_plain": _mean(plain, tuple(record for record, _ in both)),
        f"{name}_aligned": _mean(aligned, tuple(record for _, record in both)),
        f"{name}_change": _mean(changes, records),
    }


def _cost(pairs: list[tuple[Run, Run]], folder: RecordFolder) -> Cell:
    """Return the ratio of seconds per step of trainings on one machine."""
    ratios: list[float] = []
    records: list[Record] = []
    for plain, aligned in pairs:
        sides = [folder.latest(run.trainings[-1]) for run in (plain, aligned)]
        first, second = sides
        if first is None or second is None:
            continue
        machines = [[r.provenance.get(key) for key in MACHINE] for r in (first, second)]
        if machines[0] == machines[1]:
            ratios.append(first.values["images_per_s"] / second.values["images_per_s"])
            records += [first, second]
    return _mean(ratios, tuple(records)) if ratios else GAP


def _mean(values: list[float], records: tuple[Record, ...]) -> Cell:
    """Return a mean with its standard error, if there are several values."""
    error = None
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
    return Cell(statistics.fmean(values), error, records=records)
