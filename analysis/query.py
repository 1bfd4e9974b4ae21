"""Queries over the committed records, and all of them as one pandas table. No torch.

from analysis.query import ReferenceStore, frame
frame(ReferenceStore()).query("kind == 'timing'")["values.images_per_s"]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.reference import ReferenceStore
from experiments import ablation, main_results
from experiments.declared.protocols import DIGITS
from experiments.engine.records.comparison import clashes
from experiments.engine.records.score_names import ranking_score
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.lookup import REFERENCE_SEEDS, scored_run
from experiments.engine.specs.rows import Row, Table, in_order
from experiments.engine.specs.selection import Run, Selection
from experiments.engine.specs.spec import Backbone, Stage, canonical
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    evaluate_stage,
    timed_rows,
    timing_stage,
)

if TYPE_CHECKING:
    import pandas

TRAINED = {
    table.number: table
    for table in in_order(ablation.TABLES | main_results.TABLES)
    if not table.counts_only
}

# The score by which rows are compared on digits.
DIGITS_SCORE = ranking_score(DIGITS.features)

# The batch at which the paper measured throughput.
PAPER_BATCH = 64


def frame(store: Store) -> pandas.DataFrame:
    """Return every committed record as one row of a table.

    A record is what was measured at once under one set of conditions, so it is the observation
    and its row. Columns of other kinds of records are missing values: `dropna(axis=1, how="all")`
    drops them after a selection of one kind. `melt` makes one row per value.

    Returns:
        A table with these columns, indexed by the record's name (`<kind>/<id>-<utc>`):
            kind, id, status, utc, error: of the record.
            spec.*: what was declared, nested fields joined by dots (spec.train.seed).
            values.*: what was measured (values.fd_digits, values.images_per_s).
            provenance.*: where it was measured (provenance.device, provenance.commit).
        Numbers keep their type where all records hold one. Lists stay lists.
    """
    import pandas

    records = sorted(store.reference.all(), key=lambda record: record.name)
    table = pandas.json_normalize([_flat_record(record) for record in records])
    table.index = pandas.Index([record.name for record in records], name="name")
    return table


def _flat_record(record: Record) -> dict[str, Any]:
    fields = ("kind", "id", "status", "utc", "error", "spec", "values", "provenance")
    return {name: getattr(record, name) for name in fields}


def trained_rows(table: Table) -> dict[str, Row]:
    """Rows of a table that have a network to train, by label."""
    return {row.label: row for row in (*table.rows, *table.outside) if row.backbone}


def trained_row(table: Table, label: str) -> Row:
    """The row of a label.

    Raises:
        ValueError: if the label is unknown, or is one of published numbers alone.
    """
    row = table.row(label)
    if row.backbone is None:
        raise ValueError(
            f"row {label!r} of table {table.number} holds published numbers only: "
            "no network is known"
        )
    return row


def reference_selection(table: Table, protocol: Protocol, store: Store) -> Selection:
    """A table's rows at the training seeds that the committed records hold of its baseline."""
    return Selection(table, table.rows, protocol, reference_seeds(table, protocol, store), "cpu")


def reference_seeds(table: Table, protocol: Protocol, store: Store) -> list[int]:
    """The training seeds of a table's baseline with a committed score; seed 0 for none."""
    seeds = [
        seed
        for seed in REFERENCE_SEEDS
        if store.reference.latest(evaluate_stage(table.baseline, protocol, seed))
    ]
    return seeds or [0]


def scores_of(row: Row, protocol: Protocol, store: Store) -> list[Record]:
    """The committed scores of a row under a protocol, one record per training seed."""
    runs = (Run.of(row, protocol, seed) for seed in REFERENCE_SEEDS)
    records = (scored_run(run, store.reference) for run in runs)
    return [record for record in records if record is not None]


class Rankable(NamedTuple):
    """The scores of rows that may be ranked together."""

    # of every row; empty for a row that was scored by another protocol
    scores: list[list[Record]]
    # by the label of a row that was scored by another protocol, the fields that differ
    refused: dict[str, list[str]]


def rankable(rows: Sequence[Row], protocol: Protocol, store: Store) -> Rankable:
    """The scores of rows, as far as they are known to be of the first row's protocol."""
    scores = [scores_of(row, protocol, store) for row in rows]
    first: list[Record] = next((records for records in scores if records), [])

    refused = {}
    for row, records in zip(rows, scores, strict=True):
        fields = clashes(records, first)
        if fields:
            refused[row.label] = fields
    kept = [
        [] if row.label in refused else records for row, records in zip(rows, scores, strict=True)
    ]
    return Rankable(kept, refused)


def latest(stages: Sequence[Stage], store: Store) -> Iterator[Record]:
    """The committed records of these stages, without the gaps."""
    records = (store.reference.latest(stage) for stage in stages)
    return (record for record in records if record is not None)


def measured_stages(table: Table) -> list[Stage]:
    """The counts of a table's rows, and their timings on a CPU."""
    timed = timed_rows(table, table.rows, "cpu", named=True)
    counts = [cost for row in table.rows for cost in cost_stages(row)]
    return [*counts, *(timing_stage(row, table.baseline, "cpu") for row in timed)]


def gpu_timings(backbone: Backbone, size: int, store: ReferenceStore) -> list[Record]:
    """Committed GPU timings of a network's forward pass at a latent size, oldest first.

    They are of every numeric mode that was recorded, without compiled networks and CUDA graphs.
    """
    network = canonical(backbone, full=True)
    records = [
        record
        for record in store.all_records()
        if record.kind == "timing"
        and record.status == "done"
        and _is_plain_gpu_forward(record.spec)
        and (record.spec["backbone"], record.spec["size"]) == (network, size)
    ]
    store.note(records)
    return records


def _is_plain_gpu_forward(spec: dict[str, Any]) -> bool:
    is_forward = spec.get("what", "forward") == "forward"
    is_accelerated = spec.get("compile") or spec.get("graphs")
    return spec["device"] == "cuda" and is_forward and not is_accelerated


def runtime_of(record: Record) -> tuple[float, float]:
    """Milliseconds per image of a timing, and half their interquartile range."""
    rate = record.values["images_per_s"]
    return 1000 / rate, 1000 / rate * record.values.get("images_per_s_spread", math.nan) / rate


def numeric_mode(record: Record) -> str:
    """Precision and TF32 flags in force, and whether attention was written out, as a label."""
    flags = record.provenance["precision_flags"]
    enabled = [name.removesuffix("_tf32") for name in sorted(flags) if flags[name]]
    mode = f"{record.spec['precision']}, TF32 {' and '.join(enabled) if enabled else 'off'}"
    if record.spec["kernels"].get("attention") == "reference":
        mode += ", attention unfused"
    return mode


# By network, its timing.
ByNetwork = dict[str, Record]


def at_one_batch(
    timings: Mapping[str, Sequence[Record]],
) -> dict[tuple[str, str, int], ByNetwork]:
    """The newest timing of each network, at one batch per numeric mode and device.

    The batch is the one up to the paper's at which most networks were timed, the largest of
    several. Keys are (numeric mode, device, batch).
    """
    batches: dict[tuple[str, str], dict[int, ByNetwork]] = {}
    for name, records in timings.items():
        for record in records:
            batch = record.spec["batch"]
            if batch <= PAPER_BATCH:
                mode = (numeric_mode(record), record.provenance["device"])
                batches.setdefault(mode, {}).setdefault(batch, {})[name] = record

    chosen = {}
    for mode, by_batch in batches.items():
        best = max(by_batch, key=lambda batch: (len(by_batch[batch]), batch))
        chosen[*mode, best] = by_batch[best]
    return chosen
