"""Sheets of sweeps over the batch size, of Figure 3's runtimes and of profiles. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.engine.records.store import Record, RecordFolder
from experiments.engine.reporting.efficiency.speed import EAGER, Acceleration, ceiling_of
from experiments.engine.reporting.sheet import GAP, Cell, Column, Kind, NoteKind, Sheet, Topic
from experiments.engine.reporting.sheet import SheetRow as Cells
from experiments.engine.specs.spec import Profile, Timing


@dataclass(frozen=True)
class SweptRow:
    """A row that is timed at growing batches, by numeric mode."""

    label: str
    device: str
    task: str
    stages: dict[str, tuple[Timing, ...]]
    acceleration: Acceleration = EAGER


def sweep_sheet(swept: SweptRow, source: RecordFolder) -> Sheet:
    """Return throughput over the batch size, with the best batch of each mode in a note."""
    modes = tuple(swept.stages)
    sheet = Sheet(
        f"{swept.label}: {swept.task} over the batch size on this {swept.device}"
        f"{swept.acceleration}",
        [Column("batch", "batch")]
        + [Column(mode, "img/s", mode, digits=1, topic=Topic.SPEED) for mode in modes],
    )

    # The largest batches have no record: they were not tried or did not fit.
    rates: dict[int, Cells] = {}
    for mode, stages in swept.stages.items():
        for stage in stages:
            record = source.latest(stage)
            if record:
                rates.setdefault(stage.batch, {})[mode] = _rate_cell(record)
    for batch, cells in sorted(rates.items()):
        sheet.add_row({"batch": Cell(label=str(batch)), **cells})

    for mode in modes:
        timed = [(batch, cells[mode].value or 0) for batch, cells in rates.items() if mode in cells]
        if timed:
            batch, rate = max(timed, key=lambda pair: pair[1])
            sheet.note(
                NoteKind.SPEED,
                f"{mode}: best at batch {batch}, {rate:.1f} images per second. Larger batches than "
                "the last were not tried or do not fit.",
            )
    return sheet


def _rate_cell(record: Record) -> Cell:
    values = record.values
    return Cell(values["images_per_s"], values["images_per_s_spread"], digits=1, records=(record,))


def runtime_sheet(
    stages: Sequence[Timing], device: str, source: RecordFolder, acceleration: Acceleration = EAGER
) -> Sheet:
    """Return milliseconds per image of Figure 3's networks, in every mode of the stages."""
    modes = dict.fromkeys(stage.precision for stage in stages)
    sheet = Sheet(
        f"Figure 3: runtime of a forward pass on this {device}{acceleration}, ms per image",
        [Column("network", "network", kind=Kind.PROSE), Column("latent", "latent")]
        + [Column(mode, "ms", mode, topic=Topic.SPEED) for mode in modes],
    )

    # One row holds a network at one size of its latent.
    rows: dict[tuple[str, int], Cells] = {}
    for stage in stages:
        name = stage.backbone.name
        cells = rows.setdefault(
            (name, stage.size),
            {"network": Cell(label=name), "latent": Cell(label=str(stage.size))},
        )
        cells[stage.precision] = _runtime_cell(source.latest(stage))
    for cells in rows.values():
        sheet.add_row(cells)
    sheet.note(
        NoteKind.ROWS,
        "The paper's figure prints no numbers. It names a DiS-XL that its authors never described; "
        "DiS-H/2 stands here instead.",
    )
    return sheet


def _runtime_cell(record: Record | None) -> Cell:
    if record is None:
        return GAP
    rate, spread = record.values["images_per_s"], record.values["images_per_s_spread"]
    return Cell(1000 / rate, 1000 / rate * spread / rate, records=(record,))


PROFILE_COLUMNS = (
    Column("operators", "operators", kind=Kind.PROSE),
    Column("calls", "calls", topic=Topic.SPEED),
    Column("ms", "ms", digits=1, topic=Topic.SPEED),
    Column("share", "% of them", digits=0, topic=Topic.SPEED),
    Column("gmac", "GMAC", topic=Topic.SPEED),
    Column("gb", "GB", topic=Topic.SPEED),
    Column("roofline", "roofline, ms", digits=1, topic=Topic.SPEED),
    Column("roofline_share", "% of it", digits=0, topic=Topic.SPEED),
)


def profile_sheets(
    label: str, profiles: Sequence[Profile], device: str, task: str, source: RecordFolder
) -> list[Sheet]:
    """Return one sheet per mode: time by class of operator, beside what the ceilings allow."""
    sheets = []
    for stage in profiles:
        mode = stage.timing.precision
        sheet = Sheet(
            f"{label}: where {task} spends its time on this {device}, {mode}, "
            f"batch {stage.timing.batch}",
            list(PROFILE_COLUMNS),
        )

        # A profile says little without the ceilings of the device in the same mode.
        record, top = source.latest(stage), ceiling_of(device, mode, source)
        if record and top:
            _fill_profile(sheet, record, top)
        else:
            sheet.note(NoteKind.GENERAL, "not profiled yet")

        sheets.append(sheet)
    return sheets


def _fill_profile(sheet: Sheet, record: Record, top: Record) -> None:
    """Add the classes of operators of a profile, the slowest first."""
    classes: dict[str, dict[str, Any]] = record.values["classes"]
    total = sum(operators["seconds"] for operators in classes.values())
    both = (record, top)
    for name, operators in sorted(classes.items(), key=lambda item: -item[1]["seconds"]):
        # A class takes at least as long as its products or its bytes alone.
        compute = operators["macs"] / top.values["macs_per_s"]
        memory = operators["bytes"] / top.values["bytes_per_s"]
        least = max(compute, memory)
        numbers = {
            "ms": 1e3 * operators["seconds"],
            "share": 100 * operators["seconds"] / total,
            "gmac": 1e-9 * operators["macs"],
            "gb": 1e-9 * operators["bytes"],
            "roofline": 1e3 * least,
            "roofline_share": 100 * least / operators["seconds"],
        }
        cells = {key: Cell(value, records=both) for key, value in numbers.items()}
        cells["operators"] = Cell(label=name)
        cells["calls"] = Cell(label=str(operators["calls"]))
        sheet.add_row(cells)

    sheet.note(
        NoteKind.SPEED,
        f"A call takes {1e3 * record.values['seconds']:.1f} ms. Its operators, each timed alone, "
        f"take {1e3 * total:.1f} ms. The trace is {record.values['trace']} in runs/{record.id}.",
        "roofline: the least time that the multiply-accumulates at the rate of a large product, "
        "and the bytes at the rate of a copy, can take. Caches let small tensors exceed it.",
    )
