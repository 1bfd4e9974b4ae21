"""Tables of one image's latency and of the memory of inference. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.engine.records.store import Record, RecordFolder
from experiments.engine.reporting.caveats import timing_caveats
from experiments.engine.reporting.efficiency.inference.predicted import (
    LATENCY_MODEL,
    TRACED_MODES,
    LatencyRow,
    needs_in,
    read_inference,
    read_latencies,
)
from experiments.engine.reporting.efficiency.memory import GB
from experiments.engine.reporting.efficiency.predicted_sheets import (
    ENDS,
    MODES,
    digits_of,
    model_notes,
)
from experiments.engine.reporting.efficiency.speed import EAGER, Acceleration
from experiments.engine.reporting.sheet import FAILED, GAP, Cell, Column, Kind, NoteKind, Sheet
from experiments.engine.reporting.sheet import SheetRow as Cells
from experiments.engine.specs.spec import Latency

PREDICT = "`experiments/efficiency.py --predict --task latency`"
GB_NOTE = "A GB is 10^9 bytes. It holds the weights, the inputs and what a pass keeps at its peak."
BATCH_NOTE = (
    "batch: that of the row's throughput, which is 64 images on a GPU, 16 if a network's input is "
    "wider than 256, and 4 on a CPU."
)
ROW = Column("row", "row", kind=Kind.PROSE)
BATCH = Column("batch", "batch", digits=0)


# ---- Measured


def latency_sheet(
    rows: Sequence[LatencyRow],
    device: str,
    root: Path,
    source: RecordFolder,
    acceleration: Acceleration = EAGER,
) -> Sheet:
    """Return the measured latency of one image, and the memory of inference beside the traced one.

    Args:
        rows: what was declared on the device.
        device: "cpu" or "cuda".
        root: the results folder of the predictions.
        source: the records.
        acceleration: how the networks ran.
    """
    place = device.upper().replace("CUDA", "GPU")
    modes = list(dict.fromkeys(mode for row in rows for mode in row.stages))
    columns = [ROW, BATCH]
    for mode in modes:
        titles = {
            "median": "ms",
            "p95": "ms, 95 %",
            "one": "GB, one image",
            "batch": "GB, batch",
            "traced": "traced / measured",
        }
        columns += [Column(f"{mode}_{key}", title, mode) for key, title in titles.items()]
    sheet = Sheet(
        f"Latency of one image and memory of inference on this {place}{acceleration}", columns
    )

    # Traced memory is that of eager networks.
    known = {} if acceleration else read_inference(root)
    recorded: list[tuple[str, Record]] = []
    for row in rows:
        cells = _row_cells(row)
        for mode, stage in row.stages.items():
            needs = needs_in(mode, row.table, row.label, known)
            traced = needs.peak(stage.timing.batch) if needs else None
            cells |= _measured_cells(stage, mode, traced, source)
            record = source.latest(stage)
            if record:
                recorded.append((f"{row.label} ({mode})", record))
        sheet.add_row(cells)

    sheet.note(
        NoteKind.SPEED,
        "ms: median over single forward passes of one image, each from an idle device to an idle "
        "device, and the time that 95 % of them stay within.",
        BATCH_NOTE,
        GB_NOTE + " On a CPU it is what PyTorch's allocator gave; libraries' own scratch memory "
        "is not heard.",
        "traced / measured: the memory that was traced without a GPU over the measured one, at "
        "the full batch.",
    )
    if device == "cpu":
        sheet.note(NoteKind.SPEED, "Large networks are measured if --rows names them.")
    sheet.notes += timing_caveats(recorded)
    return sheet


def _row_cells(row: LatencyRow) -> Cells:
    """Return what names a row, and its full batch."""
    (batch,) = {stage.timing.batch for stage in row.stages.values()}
    return {"row": Cell(label=f"{row.table}: {row.label}"), "batch": Cell(batch)}


def _measured_cells(stage: Latency, mode: str, traced: int | None, source: RecordFolder) -> Cells:
    record = source.latest(stage)
    if record is None:
        failed = source.latest(stage, status="failed")
        return {f"{mode}_median": FAILED if failed else GAP}
    values, own = record.values, (record,)
    numbers = {
        "median": 1e3 * values["latency_s"],
        "p95": 1e3 * values["latency_p95_s"],
        "one": values["peak_memory_bytes_one"] / GB,
        "batch": values["peak_memory_bytes_batch"] / GB,
    }
    cells = {
        f"{mode}_{key}": Cell(value, digits=digits_of(value), records=own)
        for key, value in numbers.items()
    }
    if traced:
        cells[f"{mode}_traced"] = Cell(traced / values["peak_memory_bytes_batch"], records=own)
    return cells


# ---- Predicted


def predicted_latency_sheet(rows: Sequence[LatencyRow], root: Path, source: RecordFolder) -> Sheet:
    """Return the predicted milliseconds of one image on every card, beside what was measured.

    Args:
        rows: what was declared on a GPU.
        root: the results folder of the predictions.
        source: the records of what was measured.
    """
    predictions = read_latencies(root)
    columns = [ROW, Column("card", "card", kind=Kind.PROSE)]
    for mode in MODES:
        columns += [Column(f"{mode}_{end}", end, mode) for end in ("attained", "bound", "measured")]
    sheet = Sheet("Predicted before any measurement: latency of one image, ms", columns)
    for row in rows:
        for card in dict.fromkeys(key[3] for key in predictions):
            cells: Cells = {
                "row": Cell(label=f"{row.table}: {row.label}"),
                "card": Cell(label=card),
            }
            for mode, stage in row.stages.items():
                prediction = predictions.get((row.table, row.label, mode, card))
                if prediction:
                    for end in ("attained", "bound"):
                        value = getattr(prediction, end)
                        cells[f"{mode}_{end}"] = Cell(value, digits=digits_of(value))
                record = source.latest(stage)
                if record and card in record.provenance["device"]:
                    value = 1e3 * record.values["latency_s"]
                    digits = digits_of(value)
                    cells[f"{mode}_measured"] = Cell(value, digits=digits, records=(record,))
            sheet.add_row(cells)
    sheet.note(
        NoteKind.SPEED,
        ENDS,
        "One image rarely keeps a card busy: where both ends are equal, launches decide. No GPU "
        "graph is assumed.",
        *model_notes(root, LATENCY_MODEL, PREDICT),
    )
    return sheet


def inference_sheet(rows: Sequence[LatencyRow], root: Path, source: RecordFolder) -> Sheet:
    """Return the traced memory of inference at batch 1 and at the full batch, beside GPU records.

    Args:
        rows: what was declared on a GPU.
        root: the results folder of the predictions.
        source: the records of what was measured.
    """
    known = read_inference(root)
    columns = [ROW, BATCH]
    for mode in TRACED_MODES:
        titles = {
            "weights": "weights",
            "one": "one image",
            "batch": "batch",
            "measured_one": "one image, measured",
            "measured_batch": "batch, measured",
        }
        columns += [Column(f"{mode}_{key}", title, f"{mode}, GB") for key, title in titles.items()]
    sheet = Sheet("Memory of inference on a GPU, predicted", columns)
    for row in rows:
        cells = _row_cells(row)
        for mode in TRACED_MODES:
            stage = row.stages[mode]
            needs = needs_in(mode, row.table, row.label, known)
            if needs:
                numbers = {
                    "weights": needs.weights,
                    "one": needs.peak(1),
                    "batch": needs.peak(stage.timing.batch),
                }
                cells |= {f"{mode}_{key}": Cell(value / GB) for key, value in numbers.items()}
            record = source.latest(stage)
            if record:
                for key in ("one", "batch"):
                    value = record.values[f"peak_memory_bytes_{key}"] / GB
                    cells[f"{mode}_measured_{key}"] = Cell(value, records=(record,))
        sheet.add_row(cells)
    sheet.note(
        NoteKind.GENERAL,
        f"{GB_NOTE} The context, workspaces of libraries and fragmentation are not seen.",
        BATCH_NOTE,
        "bf16 is autocast, which keeps a bf16 copy of the weights of products beside them. tf32 "
        "and as_published need what fp32 needs.",
    )
    if not known:
        sheet.note(NoteKind.GENERAL, f"Nothing is traced yet; {PREDICT} does it.")
    return sheet
