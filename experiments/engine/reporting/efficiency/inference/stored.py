"""What packing a network's weights saves: memory as published and as measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.engine.records.store import RecordFolder, Store
from experiments.engine.reporting.efficiency.memory import GB
from experiments.engine.reporting.efficiency.predicted_sheets import digits_of
from experiments.engine.reporting.lookup import PublishedTable
from experiments.engine.reporting.sheet import GAP, Cell, Column, Kind, NoteKind, Sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Latency

MEASURED = (
    "measured: forward passes in fp32 on this suite's CPU. weights: parameters and buffers as they "
    "lie in memory. pass: the most that PyTorch's allocator gave at once, weights included. ms: "
    "the median over single passes of one image. A GB is 10^9 bytes."
)
PUBLISHED = (
    "published: weights are the size of the file, pass is the peak on a GPU while images are "
    "drawn, and s is the time of drawing, which is no single pass."
)
SAME_WORK = (
    "Multiply-accumulates do not change: packed weights are unpacked to full precision before "
    "every product, which takes time. They are counted once for both forms."
)


def stored_sheet(
    table: Table, stages: Mapping[str, Latency], store: Store, source: RecordFolder
) -> Sheet:
    """Return the memory and the time of every row in its form.

    Args:
        table: rows of networks by the form of their weights.
        stages: what was measured of each row, by its label.
        store: the published numbers.
        source: the records.
    """
    paper = PublishedTable(table, store)
    memory, time = "GB", "time"
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("weights_paper", "weights, published", memory, 1),
        Column("weights", "weights, measured", memory, 2),
        Column("peak_paper", "pass, published", memory, 2),
        Column("peak", "pass, measured", memory, 2),
        Column("seconds_paper", "s, published", time, 0),
        Column("ms", "ms, measured", time, 0),
        Column("core", "core", "Gflops"),
    ]
    sheet = Sheet(f"{table.title} ({table.source})", columns)
    for row in table.rows:
        published = {
            "weights_paper": paper.cell(row, "weights_gb"),
            "peak_paper": paper.cell(row, "peak_gb"),
            "seconds_paper": paper.cell(row, "seconds"),
        }
        measured = _measured(stages[row.label], source)
        core = _counted(row, source)
        sheet.add_row({"row": Cell(label=row.label), **published, **measured, "core": core})
    sheet.note(NoteKind.GENERAL, PUBLISHED, MEASURED, SAME_WORK)
    return sheet


def _measured(stage: Latency, source: RecordFolder) -> dict[str, Cell]:
    record = source.latest(stage)
    if record is None:
        return {}
    values, own = record.values, (record,)
    numbers = {
        "weights": values["weights_bytes"] / GB,
        "peak": values["peak_memory_bytes_one"] / GB,
        "ms": 1e3 * values["latency_s"],
    }
    return {
        key: Cell(value, digits=digits_of(value), records=own) for key, value in numbers.items()
    }


def _counted(row: Row, source: RecordFolder) -> Cell:
    (cost,) = row.costs
    record = source.latest(cost)
    return Cell(record.values["macs_core"] / 1e9, records=(record,)) if record else GAP
