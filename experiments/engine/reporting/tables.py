"""From declared rows and records to a sheet of cells: paper, reference and this machine side by side. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from experiments.engine.records.comparison import clashes, machines, not_recorded
from experiments.engine.records.manifest import score_name
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.lookup import (
    PAPER_CONDITIONS,
    PAPER_SCORES,
    REFERENCE_SEEDS,
    SCORES,
    _latest,
    _records,
    _run,
    seed_values,
)
from experiments.engine.reporting.notes import _notes
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.reporting.statistics import LEVEL, agree, pooled
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    timed_rows,
    timing_stage,
)


def main_sheet(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
    source: RecordFolder | None = None,
) -> Sheet:
    """Counts, throughput and scores of this machine (or of the reference) beside the paper's."""
    source = source or store.here
    scores = [] if table.counts_only else list(SCORES[protocol.features])
    published = store.published(table.published, table.key)
    given = next(iter(published.values())).keys()  # a published table has the columns that it has
    params = next((name for name in ("params_m", "params") if name in given), None)
    machine = "this machine" if source is store.here else "reference"
    columns = [("", "row")] + [("", name) for name in ("type",) if name in given]
    columns += [("params, M", "paper")] * (params is not None) + [
        ("params, M", "ours"),
        ("Gflops", "paper"),
        ("Gflops", "ours"),
        ("Gflops", "core"),
    ]
    if not table.counts_only:
        columns += [
            (f"throughput, {machine}", "img/s"),
            (f"throughput, {machine}", "rel."),
            ("paper, A100", "img/s"),
            ("paper, A100", "rel."),
        ] * table.timed
        columns += [
            (f"{protocol.name} ({machine}, {_seed_words(seeds)})", _score_header(name, protocol))
            for name in scores
        ]
        columns += [
            (f"paper: {table.conditions}", name)
            for name in ("steps", "guided")
            if PAPER_CONDITIONS[name] in given
        ]
        columns += [(f"paper: {table.conditions}", name) for name in PAPER_SCORES.values()]
    sheet = Sheet(f"Table {table.number}: {table.title} ({table.source})", columns)
    first = published[table.baseline.published] if table.baseline.published else {}
    for row in rows:
        paper = published[row.published] if row.published else {}
        cells = [Cell(label=row.label)] + [
            Cell(label=paper.get("type", "")) for name in ("type",) if name in given
        ]
        cells += [_paper(paper, params)] * (params is not None) + [
            _count(store, row, source, "params_trainable", 1e6, 1)
        ]
        cells += [
            _paper(paper, "gflops"),
            _count(store, row, source, "macs_torchprofile", 1e9, 2),
            _count(store, row, source, "macs_core", 1e9, 2),
        ]
        if not table.counts_only:
            if table.timed:
                timed = (
                    _latest(store, timing_stage(row, table.baseline, device), source)
                    if timed_rows(table, [row], device, named=True)
                    else None
                )
                cells += [
                    _of(timed, "images_per_s", 1),
                    _of(timed, "relative", 2),
                    _paper(paper, "throughput_img_s"),
                    _relative(paper, first),
                ]
            cells += [_score(store, row, protocol, seeds, name, source) for name in scores]
            cells += [
                Cell(label=paper.get(name) or "-")
                for name in PAPER_CONDITIONS.values()
                if name in given
            ]
            cells += [_paper(paper, key) for key in PAPER_SCORES]
        sheet.rows.append(cells)
    sheet.notes += _notes(table, rows, protocol, seeds, device, store, source)
    return sheet


def comparison_sheet(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
) -> Sheet:
    """This machine's scores beside the committed reference's, and whether they agree within their error, where one protocol measured both."""
    scores = [
        name for name in SCORES[protocol.features] if name != "fid_corrected"
    ]  # follows from fid
    columns = [("", "row"), ("throughput, rel.", "reference"), ("throughput, rel.", "here")]
    columns += [
        (score_name(name, protocol.num) if protocol.features == "inception" else name, side)
        for name in scores
        for side in ("reference", "here")
    ] + [("", "reproduced")]
    sheet = Sheet(
        f"Table {table.number} on {protocol.name}: this machine against the reference", columns
    )
    reference = {
        row.label: seed_values(store, row, protocol, REFERENCE_SEEDS, store.reference)
        for row in rows
    }
    here = {row.label: seed_values(store, row, protocol, seeds, store.here) for row in rows}
    spread = {name: pooled(name, [records for records in reference.values()]) for name in scores}
    differ = {
        row.label: clashes(
            _records(store, row, protocol, seeds, store.here),
            _records(store, row, protocol, REFERENCE_SEEDS, store.reference),
        )
        for row in rows
    }
    other = {
        label: [field for field in found if not field.startswith(machines(protocol.features))]
        for label, found in differ.items()
    }
    compared = {label for label in other if reference[label] and here[label] and not other[label]}
    comparisons = len(compared) * len(scores)
    for row in rows:
        cells = [Cell(label=row.label)]
        timed = timed_rows(table, [row], device, named=True)
        cells += [
            _of(_latest(store, timing_stage(row, table.baseline, device), source), "relative", 2)
            if timed
            else Cell()
            for source in (store.reference, store.here)
        ]
        known, off = row.label in compared, []
        for name in scores:
            cells += [
                mean_cell(name, side[row.label], 1 if name.startswith(("fd", "is")) else 2)
                for side in (reference, here)
            ]
            if known and not agree(
                name, reference[row.label], here[row.label], spread[name], comparisons
            ):
                off.append(name)
        verdict = (
            "other protocol"
            if other[row.label]
            else "-"
            if not known
            else "spread unknown"
            if None in spread.values()
            else "no: " + ", ".join(off)
            if off
            else "yes"
        )
        sheet.rows.append([*cells, Cell(label=verdict)])
    sheet.notes.append(
        "reproduced: every score lies within the reference's spread over training seeds, pooled over the rows "
        f"(two-sided {1 - LEVEL:.0%} for all {comparisons} comparisons together, Bonferroni; fd on a log scale)"
    )
    for words, found in (
        ("other protocol: no verdict, for the reference was measured", other),
        (
            "compared all the same: another machine measures",
            {label: differ[label] for label in compared},
        ),
    ):
        if fields := sorted({field for fields in found.values() for field in fields}):
            sheet.notes.append(
                f"{words} with another {', '.join(fields)} (experiments/diff_protocol.py says what that does)"
            )
    sheet.notes += not_recorded(
        [
            record
            for row in rows
            for source, given in ((store.here, seeds), (store.reference, REFERENCE_SEEDS))
            for record in _records(store, row, protocol, given, source)
        ]
    )
    return sheet


def _score_header(name: str, protocol: Protocol) -> str:
    """Scores on a classifier's features say so where they could be taken for Inception's; the others carry their N."""
    if protocol.features == "inception":
        return score_name(name, protocol.num)
    return name if name.startswith("fd_") else name.removesuffix(f"_{protocol.features}")


def _seed_words(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _of(record: Record | None, name: str, digits: int) -> Cell:
    if record is None:
        return Cell()
    if record.status != "done":
        return Cell(label="failed")
    return Cell(
        record.values.get(name), record.values.get(f"{name}_spread"), digits, records=(record,)
    )


def _count(
    store: Store, row: Row, source: RecordFolder, name: str, unit: float, digits: int
) -> Cell:
    """The sum over the networks of the published system."""
    records = [_latest(store, cost, source) for cost in cost_stages(row)]
    if not all(records):
        return Cell()
    if any(record.status != "done" for record in records):
        return Cell(label="failed")
    return (
        Cell(
            sum(record.values[name] for record in records) / unit,
            None,
            digits,
            records=tuple(records),
        )
        if records
        else Cell()
    )


def _paper(row: dict[str, str], key: str) -> Cell:
    """A published number with the digits that were published; in its own words, a number of millions, where it has a unit (675M)."""
    text = row.get(key, "")
    if text and text[-1] in "MB":
        return Cell(float(text[:-1]) * (1000 if text[-1] == "B" else 1), label=text)
    return Cell(float(text), None, len(text.partition(".")[2])) if text else Cell()


def _relative(paper: dict[str, str], first: dict[str, str]) -> Cell:
    rates = [row.get("throughput_img_s") for row in (paper, first)]
    return Cell(float(rates[0]) / float(rates[1])) if all(rates) else Cell()


def _score(
    store: Store,
    row: Row,
    protocol: Protocol,
    seeds: Sequence[int],
    name: str,
    source: RecordFolder,
) -> Cell:
    """`mean_cell` of a row's records, or that it failed."""
    if not row.backbone:
        return Cell()
    records = tuple(_records(store, row, protocol, seeds, source))
    if not records:
        stages = [stage for seed in seeds for stage in _run(row, protocol, seed)]
        failed = any(
            source.latest(stage) is None and source.latest(stage, status="failed")
            for stage in stages
        )
        return Cell(label="failed") if failed else Cell()
    return replace(
        mean_cell(
            name,
            [record.values for record in records],
            1 if name.startswith(("fd", "is", "fid")) else 2,
        ),
        records=records,
    )


def mean_cell(name: str, values: list[dict[str, float]], digits: int = 2) -> Cell:
    """Mean over seeds with its standard error, or one seed's value with its sampling error."""
    if not values:
        return Cell()
    if len(values) == 1:
        return Cell(values[0][name], values[0].get(f"{name}_se"), digits)
    numbers = [value[name] for value in values]
    return Cell(
        statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers)), digits
    )
