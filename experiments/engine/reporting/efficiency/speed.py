"""Tables of throughput in every numeric mode, beside ceilings and the paper. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.caveats import timing_caveats
from experiments.engine.reporting.lookup import PublishedTable
from experiments.engine.reporting.sheet import (
    FAILED,
    GAP,
    Cell,
    Column,
    Kind,
    NoteKind,
    Sheet,
    Topic,
)
from experiments.engine.reporting.sheet import SheetRow as Cells
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Ceilings, Timing
from experiments.engine.specs.stages import cost_stages

AS_PUBLISHED = "as_published"  # the authors' numeric mode
A100_FP32 = 19.5e12  # operations per second without tensor cores (NVIDIA A100 data sheet)

# What runs in plain PyTorch where a GPU has a fused kernel: by op and choice, as records name them.
UNFUSED = {
    ("selective_scan", "loop"): "the scan as a loop over tokens",
    ("selective_scan", "reference"): "the scan as a loop over tokens",
    ("gated_linear", "chunked"): "gated linear attention in chunks of plain PyTorch",
    ("gated_linear", "reference"): "gated linear attention as a loop over tokens",
    ("attention", "reference"): "attention written out",
}


@dataclass(frozen=True)
class Acceleration:
    """What makes the steps of a timing faster. The authors' mode has neither."""

    # Networks are compiled with torch.compile.
    compile: bool = False
    # Steps run as CUDA graphs.
    graphs: bool = False

    def __bool__(self) -> bool:
        return self.compile or self.graphs

    def __str__(self) -> str:
        """Return the end of a title: ', networks compiled, by CUDA graphs' or less."""
        parts = []
        if self.compile:
            parts.append(", networks compiled")
        if self.graphs:
            parts.append(", by CUDA graphs")
        return "".join(parts)


EAGER = Acceleration()


@dataclass(frozen=True)
class TimedRow:
    """A row with its timings by numeric mode."""

    row: Row
    stages: dict[str, Timing]


@dataclass(frozen=True)
class TimedTable:
    """Rows of a table that are timed on one device, doing one task."""

    table: Table
    rows: tuple[TimedRow, ...]
    device: str
    # One of "forward", "training" and "sampling".
    task: str
    # Numeric modes in the order of the columns.
    modes: tuple[str, ...]
    acceleration: Acceleration = EAGER
    # Steps of a sampling loop.
    num_steps: int = 0
    # Whether a row waits on a CPU until it is named.
    has_heavy_rows: bool = False
    # Labels of rows whose attention is none of the suite's kernels.
    written_out: tuple[str, ...] = ()


def speed_sheet(timed: TimedTable, store: Store, source: RecordFolder | None = None) -> Sheet:
    """Return images per second in every mode: relative to the baseline and to the ceilings.

    The paper timed a forward pass alone; its figures stand beside that task.

    Args:
        source: the records to read; by default those of this results folder.
    """
    source = source or store.here
    device = timed.device.upper().replace("CUDA", "GPU")
    table = timed.table
    sheet = Sheet(
        f"Table {table.number}: {timed.task} on this {device}{timed.acceleration}, "
        f"by numeric mode ({table.source})",
        _columns(timed),
    )
    for entry in timed.rows:
        counts = _counts_of(entry.row, source)
        macs = _core_macs(entry.row, counts)
        cells: Cells = {"row": Cell(label=entry.row.label)}
        if macs:
            # Networks that a laptop trains have a few thousandths of a Gflop.
            cells["core"] = Cell(macs / 1e9, digits=2 if macs >= 1e8 else 4, records=counts)
        for mode, stage in entry.stages.items():
            cells |= _timing_cells(stage, mode, macs, source)
        if timed.task == "forward":
            cells |= _paper_cells(entry.row, table, store)
        sheet.add_row(cells)

    sheet.note(NoteKind.SPEED, *_method_notes(timed, source))
    sheet.note(NoteKind.ROWS, *_row_notes(timed))
    _add_record_notes(sheet, timed, source)
    return sheet


def _columns(timed: TimedTable) -> list[Column]:
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("core", "core", "Gflops", topic=Topic.SPEED),
    ]

    # Each mode has the same columns; a GPU adds its memory and its energy.
    for mode in timed.modes:
        names = {"rate": "img/s", "relative": "rel.", "matmul": "% of matmul", "copy": "% of copy"}
        if timed.device == "cuda":
            names |= {"memory": "GiB", "energy": "J/img"}
        columns += [
            Column(f"{mode}_{key}", title, mode, topic=Topic.SPEED) for key, title in names.items()
        ]

    # The paper has forward passes alone.
    if timed.task == "forward":
        names = {"rate": "img/s", "relative": "rel.", "peak": "% of fp32 peak"}
        columns += [
            Column(f"paper_{key}", title, "paper, A100", topic=Topic.SPEED)
            for key, title in names.items()
        ]

    return columns


def _counts_of(row: Row, source: RecordFolder) -> tuple[Record, ...]:
    """Return the counts that there are of the networks of a row's system."""
    records = [source.latest(cost) for cost in cost_stages(row)]
    return tuple(record for record in records if record)


def _core_macs(row: Row, counts: Sequence[Record]) -> float | None:
    """Return the core multiply-accumulates; None if a network of the system is not counted."""
    if len(counts) < len(cost_stages(row)):
        return None
    return sum(record.values["macs_core"] for record in counts)


def ceiling_of(device: str, mode: str, source: RecordFolder) -> Record | None:
    """Return the measured ceilings of a mode. The authors' mode is compared with fp32."""
    return source.latest(Ceilings(device, "fp32" if mode == AS_PUBLISHED else mode))


def _timing_cells(stage: Timing, mode: str, core_macs: float | None, source: RecordFolder) -> Cells:
    """Return the cells of one row in one mode."""
    record = source.latest(stage)
    if record is None:
        failed = source.latest(stage, status="failed")
        return {f"{mode}_rate": FAILED if failed else GAP}
    values, own = record.values, (record,)
    cells = {
        f"{mode}_rate": Cell(
            values["images_per_s"], values["images_per_s_spread"], digits=1, records=own
        ),
        f"{mode}_relative": Cell(values["relative"], values["relative_spread"], records=own),
    }
    if stage.device == "cuda":
        memory = values["peak_memory_bytes"]
        cells[f"{mode}_memory"] = Cell(memory and memory / 2**30, digits=1, records=own)
        cells[f"{mode}_energy"] = Cell(values["joules_per_image"], records=own)

    # Shares of the ceilings: products against the matrix product, bytes against the copy.
    top = ceiling_of(stage.device, mode, source)
    if top is None:
        return cells
    both = (record, top)
    # All scales of an image are one pass over its tokens; guidance doubles a pass.
    num_steps = 1 if stage.tokenizer else stage.num_steps
    passes = {"forward": 1, "training": 3, "sampling": 2 * num_steps}[stage.what]
    if core_macs:
        share = 100 * passes * core_macs * values["images_per_s"] / top.values["macs_per_s"]
        cells[f"{mode}_matmul"] = Cell(share, digits=0, records=both)
    moved = values.get("bytes_moved")  # older records have none
    if moved:
        share = 100 * moved / stage.batch * values["images_per_s"] / top.values["bytes_per_s"]
        cells[f"{mode}_copy"] = Cell(share, digits=0, records=both)
    return cells


def _paper_cells(row: Row, table: Table, store: Store) -> Cells:
    """Return the paper's throughput of a row, alone and relative to the baseline's."""
    published = PublishedTable(table, store)
    paper = published.row(row)
    base = _number(published.row(table.baseline), "throughput_img_s")
    rate, gflops = _number(paper, "throughput_img_s"), _number(paper, "gflops")

    cells = {"paper_rate": Cell(rate, digits=1)}
    if rate and base:
        cells["paper_relative"] = Cell(rate / base)
    if rate and gflops:
        cells["paper_peak"] = Cell(100 * 2e9 * rate * gflops / A100_FP32, digits=0)
    return cells


def _number(row: dict[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


# ---- Notes


def _method_notes(timed: TimedTable, source: RecordFolder) -> list[str]:
    """Return how the rows were timed, and the measured ceilings of the device."""
    tasks = {
        "forward": "one forward pass of full batches of x, t and y",
        "training": "one step of the trainer by the common recipe, from loading the batch to the "
        "EMA. It counts as three forward passes of multiply-accumulates",
        "sampling": f"guided sampling in {timed.num_steps} steps, each on twice the batch. An "
        "image takes all of them",
    }
    if any(stage.tokenizer for row in timed.rows for stage in row.stages.values()):
        tasks["sampling"] += (
            ". A network that predicts tokens draws all scales of its images, without the decoder "
            "of its tokenizer; so rel. compares whole images at 250 steps alone"
        )

    # The first two notes define the columns and the modes.
    notes = [
        f"{timed.task}: {tasks[timed.task]}. ± is half the interquartile range. rel. is relative "
        f"to {timed.table.baseline.label}, timed in turn.",
        "fp32: without TF32. tf32: everywhere. bf16: autocast. as_published: PyTorch's defaults "
        "(convolutions in TF32, linear layers in fp32), t and y of one image, and no final "
        "synchronisation.",
    ]

    # Each numeric mode has its own ceilings; none is stated for the authors' mode.
    for mode in timed.modes:
        top = ceiling_of(timed.device, mode, source)
        if top and mode != AS_PUBLISHED:
            notes.append(
                f"measured ceilings in {mode}: {2e-12 * top.values['macs_per_s']:.2f} TFLOP/s in "
                f"large matrix products, {1e-9 * top.values['bytes_per_s']:.0f} GB/s copying."
            )
    notes.append(
        "% of copy: what the operators read and write, one by one, at the rate of a copy. Caches "
        "let small tensors exceed it. The suite's Triton kernels are not seen."
    )

    # The last notes apply to some tables only.
    if timed.acceleration:
        notes.append(
            f"{timed.task}{timed.acceleration}: the baseline too. The authors' mode as_published "
            "has neither, and stands in the table without them. Operators of compiled networks "
            "and of CUDA graphs are not seen."
        )
    if timed.device == "cpu":
        notes.append("A CPU has one numeric mode here, and its ratios are not a GPU's.")
        if timed.has_heavy_rows:
            notes.append(
                "Large networks take minutes on a CPU. They are timed only if --rows names them, "
                "and are gaps otherwise."
            )
    return notes


def _row_notes(timed: TimedTable) -> list[str]:
    """Return which rows are timed in another way than their own paper does."""
    notes = []
    if timed.written_out:
        notes.append(
            f"{', '.join(timed.written_out)}: attention is written out as in the authors' code, "
            "never fused."
        )
    if timed.task == "forward":
        return notes

    methods = [(entry.row.label, entry.row.method) for entry in timed.rows if entry.row.method]
    velocity = [label for label, method in methods if method.diffusion.name == "flow"]
    if velocity:
        notes.append(
            f"{', '.join(velocity)}: timed as predictors of noise instead of a velocity, which "
            "takes the same passes of the network."
        )
    unguided = [label for label, method in methods if not method.recipe.label_dropout]
    if unguided and timed.task == "sampling":
        notes.append(
            f"{', '.join(unguided)}: without a null label. The second half of a batch has real "
            "labels, and the classifier that guides instead is not timed."
        )
    return notes


def _add_record_notes(sheet: Sheet, timed: TimedTable, source: RecordFolder) -> None:
    """Add what the records of the rows say: failures, unstable timings, missing fused kernels."""
    recorded: list[tuple[str, Record]] = []
    plain: dict[str, list[str]] = {}

    # A row without a record says why, if it failed.
    for entry in timed.rows:
        for mode, stage in entry.stages.items():
            record = source.latest(stage)
            if record is None:
                failure = source.latest(stage, status="failed")
                if failure:
                    sheet.note(NoteKind.FAILURE, f"{entry.row.label}, {mode}: {failure.error}")
                continue

            label = f"{entry.row.label} ({mode})"
            recorded.append((label, record))
            for how in unfused(record):
                plain.setdefault(how, []).append(label)
            if _took_all_conditions(record, mode, timed.task):
                sheet.note(
                    NoteKind.ROWS,
                    f"{entry.row.label}, {mode}: makes tokens of t and y, and was given those of "
                    "all images.",
                )

    # Notes on all rows come after those on single ones.
    sheet.notes += timing_caveats(recorded)
    for how, labels in plain.items():
        sheet.note(NoteKind.SPEED, f"{how}, without a fused kernel: {', '.join(labels)}.")


def _took_all_conditions(record: Record, mode: str, task: str) -> bool:
    """Return whether the authors' way of timing one condition was not possible."""
    as_published = mode == AS_PUBLISHED and task == "forward"
    return as_published and not record.values.get("one_condition", True)


def unfused(record: Record) -> list[str]:
    """Return what ran without the fused kernel that GPUs have for it, unless the spec asked so."""
    kernels = record.provenance.get("kernels", {})
    requested = record.spec["kernels"]
    descriptions: dict[str, None] = {}
    for (op, choice), description in UNFUSED.items():
        if choice in kernels.get(op, ()) and requested.get(op) != choice:
            descriptions[description] = None
    return list(descriptions)
