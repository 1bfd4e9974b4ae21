"""What gates save: as published, as counted and as measured, side by side. No torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace

from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.lookup import Lookup, PublishedTable, mean_cell
from experiments.engine.reporting.sheet import GAP, Cell, Column, Kind, NoteKind, Sheet
from experiments.engine.specs.rows import Row
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Cost
from experiments.engine.specs.stages import Protocol, network

SHARE = (
    "used share: of the gated work that was done, as the mean over sampled images and steps; its "
    "spread is the standard deviation over these. Gated are attention and MLP, and not embeddings, "
    "adaLN, routers and head."
)
SAVINGS = (
    "Savings are against the dense parent. Published ones are of the published size, as its paper "
    "counts Gflops and as it times images on a V100. Counted ones are of the small network at its "
    "used share, with its routers."
)
MEASURED = (
    "Measured savings are in seconds of the trained network on this suite's machine, at the share "
    "of the row. gathered: only what is on is computed, for images of one time. masked: all is "
    "computed and multiplied by gates, as the authors' public code samples; below zero, it is "
    "slower than its parent."
)


def gated_rows(selection: Selection) -> list[Row]:
    """Return the rows that are trained to use a share of their gated work."""
    return [row for row in selection.networks if asked_share(row) is not None and row.tuning]


def asked_share(row: Row) -> float | None:
    """Return the share of its gated work that a row is to use; None for a row without gates."""
    return row.method.diffusion.used_share if row.method else None


def savings_sheet(selection: Selection, store: Store, folder: RecordFolder) -> Sheet:
    """Return a row per network with gates: its share, and what it saves three times over."""
    lookup = Lookup(selection, folder)
    paper = PublishedTable(selection.table, store)
    saving = "saving, %"
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("asked", "lambda", "share of gated work", 1),
        Column("used_share", "used", "share of gated work", 3),
        Column("used_share_sd", "spread", "share of gated work", 3),
        Column("published_gflops", "published, Gflops", saving, 1),
        Column("counted", "counted, MACs", saving, 1),
        Column("published_seconds", "published, time", saving, 1),
        Column("gathered", "measured, gathered", saving, 1),
        Column("masked", "measured, masked", saving, 1),
        Column("agreement", "less its parent's", "agreement", 3),
    ]
    sheet = Sheet(f"What gates save on {selection.protocol.name}", columns)
    for row in gated_rows(selection):
        records = lookup.scored(row)
        sheet.add_row(
            {
                "row": Cell(label=row.label),
                "asked": Cell(asked_share(row)),
                "published_gflops": _published(paper, row, "gflops"),
                "published_seconds": _published(paper, row, "seconds"),
                "used_share": _over_seeds(records, lambda values: values["used_share"]),
                "used_share_sd": _over_seeds(records, lambda values: values["used_share_sd"]),
                "counted": _counted(row, records, selection.protocol, folder),
                "gathered": _over_seeds(records, _measured("gathered")),
                "masked": _over_seeds(records, _measured("masked")),
                "agreement": _beside_parent(row, records, lookup),
            }
        )
    sheet.note(NoteKind.GENERAL, SHARE, SAVINGS, MEASURED)
    return sheet


def _published(paper: PublishedTable, row: Row, column: str) -> Cell:
    """Return the saving of a published number against that of the dense network."""
    gated, dense = (paper.cell(row, name).value for name in (column, f"dense_{column}"))
    return Cell(100 * (1 - gated / dense)) if gated and dense else GAP


def _counted(row: Row, records: list[Record], protocol: Protocol, folder: RecordFolder) -> Cell:
    """Return the saving in multiply-accumulates at the used share of each seed."""
    assert row.tuning is not None
    counts = [folder.latest(small_cost(each, protocol)) for each in (row, row.tuning.parent)]
    gated, dense = counts
    if gated is None or dense is None:
        return GAP
    all_on, parent = (record.values["macs_core"] for record in (gated, dense))

    def saving(values: dict[str, float]) -> float:
        off = (1 - values["used_share"]) * values["gated_macs"]
        return 100 * (1 - (all_on - off) / parent)

    return _over_seeds(records, saving, (gated, dense))


def small_cost(row: Row, protocol: Protocol) -> Cost:
    """Return the count of a row's network as a protocol trains it."""
    backbone, data = network(row, protocol), protocol.data
    if row.method is None or row.method.tokenizer is None:
        return Cost(backbone, data.size, data.channels, data.num_classes)

    # Of tokens, the last scale takes the place of an input.
    side, channels = backbone.options["sides"][-1], backbone.options["channels"]
    return Cost(backbone, side, channels, data.num_classes, row.method.tokenizer.backbone)


def _measured(path: str) -> Callable[[dict[str, float]], float]:
    """Return the saving of a path's seconds, from a record's values."""
    return lambda values: 100 * (1 - 1 / values[f"{path}_speed_up"])


def _beside_parent(row: Row, records: list[Record], lookup: Lookup) -> Cell:
    """Return by how much the labels of samples agree more than the parent's of the same seed."""
    assert row.tuning is not None
    parents = {_seed_of(record): record for record in lookup.scored(row.tuning.parent)}
    pairs = [(each, parents[_seed_of(each)]) for each in records if _seed_of(each) in parents]
    differences = [
        {"agreement": record.values["agreement"] - parent.values["agreement"]}
        for record, parent in pairs
    ]
    cell = mean_cell("agreement", differences, 3)
    return replace(cell, records=tuple(itertools.chain(*pairs)))


def _seed_of(evaluation: Record) -> int:
    return evaluation.spec["train"]["seed"]


def _over_seeds(
    records: list[Record],
    value: Callable[[dict[str, float]], float],
    further: tuple[Record, ...] = (),
) -> Cell:
    """Return the mean of a value over seeds with its standard error, if there are several."""
    if not records:
        return GAP
    numbers = [value(record.values) for record in records]
    error = None
    if len(numbers) > 1:
        error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return Cell(statistics.fmean(numbers), error, records=(*records, *further))
