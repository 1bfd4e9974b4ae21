"""Counted parameters and Gflops of the compared systems beside the published ones. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.engine.records.store import RecordFolder, Store
from experiments.engine.reporting.lookup import published_cell
from experiments.engine.reporting.sheet import (
    GAP,
    Cell,
    Column,
    Kind,
    NoteKind,
    Sheet,
    Topic,
)
from experiments.engine.specs.spec import Cost

Counts = dict[str, int]


@dataclass(frozen=True)
class System:
    """A compared system at one resolution, and how its published Gflops were counted."""

    label: str
    # In pixels of the image.
    resolution: int
    # The networks that one step of the system calls.
    costs: tuple[Cost, ...]
    # Gives the count that the published figure shows; None if no convention reproduces it.
    counter: Callable[[Counts], float] | None = None
    # The name of the published figure's counter.
    convention: str = ""
    # Where the figures are published: a file of results/published and a model in it.
    gflops: tuple[str, str] | None = None
    params: tuple[str, str] | None = None
    # A sentence of the table. The fields {hidden}, {above} and {quadruple} stand for numbers that
    # `system_notes` computes from records.
    note: str = ""
    # Whether the network is rebuilt from its paper alone, because no code was published.
    reconstruction: bool = False

    @property
    def title(self) -> str:
        return f"{self.label} (reconstruction)" if self.reconstruction else self.label


@dataclass(frozen=True)
class Named:
    """A system under the name that a table gives it, beside its published Gflops."""

    name: str
    system: System
    published: Cell


COLUMNS = (
    Column("system", "system", kind=Kind.PROSE),
    Column("resolution", "pixels"),
    Column("params_paper", "paper", "params, M", topic=Topic.COUNTS),
    Column("params", "ours", "params, M", digits=1, topic=Topic.COUNTS),
    Column("gflops_paper", "paper", "Gflops", topic=Topic.COUNTS),
    Column("gflops_same", "ours, same counter", "Gflops", topic=Topic.COUNTS),
    Column("gflops_diff", "diff. %", "Gflops", topic=Topic.COUNTS),
    Column("core", "core", "Gflops", topic=Topic.COUNTS),
    Column("core_diff", "core, diff. %", "Gflops", topic=Topic.COUNTS),
    Column("counter", "counter", kind=Kind.PROSE, topic=Topic.COUNTS),
)


def counts_sheet(
    systems: Sequence[System], store: Store, source: RecordFolder | None = None
) -> Sheet:
    """Return one row per system: published, ours by the same counter, and core.

    Args:
        source: the records to read; by default those of this results folder.
    """
    source = source or store.here
    sheet = Sheet(
        "Parameters and Gflops of the compared systems (DiCo paper, Tables 1, 2, 5, 8, 9)",
        list(COLUMNS),
    )
    named = []
    for system in systems:
        paper = _published_gflops(store, system)
        params, same, core = counted(system, source)
        sheet.add_row(
            {
                "system": Cell(label=system.title),
                "resolution": Cell(label=str(system.resolution)),
                "params_paper": _published_params(store, system),
                "params": params,
                "gflops_paper": paper,
                "gflops_same": same,
                "gflops_diff": difference(same, paper),
                "core": core,
                "core_diff": difference(core, paper),
                "counter": Cell(label=system.convention),
            }
        )
        named.append(Named(f"{system.title} at {system.resolution}", system, paper))

    sheet.note(NoteKind.COUNTS, *system_notes(named, systems, source))
    sheet.note(
        NoteKind.COUNTS,
        "Gflops are multiply-accumulates at batch 1. params are all parameters, with frozen "
        "position tables.",
    )
    return sheet


def counted(system: System, source: RecordFolder) -> tuple[Cell, Cell, Cell]:
    """Return all parameters in millions, Gflops by the published counter, and core Gflops.

    All three are gaps if one network of the system has no record.
    """
    records = [source.latest(cost) for cost in system.costs]
    found = tuple(record for record in records if record)
    if len(found) < len(records):
        return GAP, GAP, GAP

    total = {name: sum(record.values[name] for record in found) for name in found[0].values}
    same = GAP
    if system.counter:
        same = Cell(system.counter(total) / 1e9, records=found)
    params = Cell(total["params_total"] / 1e6, digits=1, records=found)
    return params, same, Cell(total["macs_core"] / 1e9, records=found)


def difference(ours: Cell, paper: Cell) -> Cell:
    """Return the difference from a published number in per cent of it; a gap if one is a gap."""
    if ours.value is None or paper.value is None:
        return GAP
    return Cell(100 * (ours.value / paper.value - 1), records=ours.records)


# ---- Notes


def system_notes(
    named: Iterable[Named], systems: Sequence[System], source: RecordFolder
) -> list[str]:
    """Return the notes of systems, each once with the names of all systems that it is about.

    Args:
        systems: where a note looks for the same network at another resolution.
    """
    groups: dict[str, list[Named]] = {}
    for entry in named:
        if entry.system.note:
            groups.setdefault(entry.system.note, []).append(entry)

    notes = []
    for note, group in groups.items():
        names = ", ".join(entry.name for entry in group)
        notes.append(f"{names}: {_filled(note, group, systems, source)}.")
    return notes


def _filled(
    note: str, group: Sequence[Named], systems: Sequence[System], source: RecordFolder
) -> str:
    """Return a note with the numbers that its fields stand for.

    hidden: by how much the published counter's figure is below core, in per cent of core.
    above: by how much core is above the published figure, in per cent of that.
    quadruple: four times the Gflops of the same network at 256 pixels.
    """
    hidden: list[float] = []
    above: list[float] = []
    for entry in group:
        _, same, core = counted(entry.system, source)
        if same.value and core.value:
            hidden.append(-100 * (same.value / core.value - 1))
        if entry.published.value and core.value:
            above.append(100 * (core.value / entry.published.value - 1))

    quadruple = "-"
    for system in systems:
        if (system.label, system.resolution) == (group[0].system.label, 256):
            same = counted(system, source)[1]
            quadruple = Cell(4 * same.value).text() if same.value else "-"
    return note.format(hidden=_range(hidden), above=_range(above), quadruple=quadruple)


def _range(shares: Sequence[float]) -> str:
    """Return the least and the greatest share in per cent."""
    if not shares:
        return "- %"
    low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


# ---- Published figures


def _published_gflops(store: Store, system: System) -> Cell:
    if system.gflops is None:
        return GAP
    file, model = system.gflops
    return published_cell(store.published(file, ("model",))[model]["gflops"])


def _published_params(store: Store, system: System) -> Cell:
    """Return the parameters as they are printed: 675M or 1.0B in Tables 8 and 9, else millions."""
    if system.params is None:
        return GAP
    file, model = system.params
    row = store.published(file, ("model",))[model]
    return Cell(label=row.get("params") or row["params_m"])
