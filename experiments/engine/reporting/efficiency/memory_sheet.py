"""The table of memory: what trainings need, and what fits a card. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.engine.reporting.efficiency.memory import (
    GB,
    Key,
    Needs,
    Settings,
    Sharding,
    largest_micro_batch,
    network_id,
    split_needs,
)
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet, SheetRow
from experiments.engine.specs.spec import Train

MODES = ("fp32", "bf16")
# Processes that share a training, and images of the micro-batch whose activations are shown.
PROCESSES = 8
IMAGES = 8
# Gigabytes of a card, unless another budget is asked for.
CARD = 24.0
# The share of a card that is left for what no trace sees. Assumed, not measured.
RESERVE = 0.1
# Columns of what does not depend on a micro-batch, by the parts' names.
STATES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimiser": "AdamW",
    "averages": "average",
}
# Columns by whether blocks are computed again.
KINDS = {False: "kept", True: "recomputed"}


@dataclass(frozen=True)
class MemoryRow:
    """A row of the table."""

    # Number of the paper's table.
    table: str
    label: str
    train: Train
    # Images per step by the row's own recipe.
    batch: int


@dataclass(frozen=True)
class Card:
    """The memory of one of several equal cards, each with one process."""

    gigabytes: float = CARD

    @property
    def free(self) -> float:
        """Return the bytes that a training may take."""
        return (1 - RESERVE) * self.gigabytes * GB

    def __str__(self) -> str:
        return f"{self.gigabytes:g} GB card"


def memory_sheet(
    declared: Sequence[MemoryRow], known: Mapping[Key, Needs], asked: str, card: Card | None = None
) -> Sheet:
    """Return what every network needs in both numeric modes, and what fits a card.

    Args:
        declared: rows; of equal networks of one table the first is shown.
        known: the traced lines.
        asked: label of the row of which notes say in words what fits.
        card: the budget that the user named; None: that of the table.

    Raises:
        ValueError: the named budget holds no image of a row under any setting.
    """
    sheet = Sheet("Memory of a training process, predicted", _columns(card or Card()))
    answered = False
    for row in _distinct(declared):
        of_row = {key[1:]: needs for key, needs in known.items() if key[0] == _id_of(row)}
        if card and of_row:
            _require_room(row, of_row, card)
        for mode in MODES:
            if (mode, False) in of_row:
                sheet.add_row(_row_cells(row, mode, of_row, card or Card()))
        if row.label == asked and of_row and not answered:
            sheet.note(NoteKind.GENERAL, *_answers(row, of_row, card or Card()))
            answered = True
    sheet.note(NoteKind.GENERAL, *_general_notes(card or Card(), _untraced(declared, known)))
    return sheet


# The needs of one network by numeric mode and by whether blocks are computed again.
_OfRow = Mapping[tuple[str, bool], Needs]


def _id_of(row: MemoryRow) -> str:
    return network_id(row.train.backbone)


def _distinct(declared: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Return the rows without those whose network an earlier row of their table has."""
    rows: dict[tuple[str, str], MemoryRow] = {}
    for row in declared:
        rows.setdefault((row.table, _id_of(row)), row)
    return list(rows.values())


def _untraced(declared: Sequence[MemoryRow], known: Mapping[Key, Needs]) -> list[str]:
    traced = {key[0] for key in known}
    return [f"{x.table}: {x.label}" for x in _distinct(declared) if _id_of(x) not in traced]


def _columns(card: Card) -> list[Column]:
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("mode", "mode", kind=Kind.PROSE),
        *(Column(*state, "GB of one process alone") for state in STATES.items()),
    ]
    group = f"GB of activations at {IMAGES} images"
    columns += [Column(f"activations_{kind}", kind, group) for kind in KINDS.values()]
    for sharding in Sharding:
        group = f"{sharding}: images at once on a {card}"
        columns += [Column(f"{sharding.name}_{x}", x, group, digits=0) for x in KINDS.values()]
    return columns


def _settings(sharding: Sharding) -> Settings:
    return Settings(PROCESSES, sharding, accumulates=True)


def _row_cells(row: MemoryRow, mode: str, of_row: _OfRow, card: Card) -> SheetRow:
    """Return the cells of a row in a numeric mode."""
    alone = split_needs(of_row[mode, False], Settings(accumulates=True), IMAGES)
    cells: SheetRow = {
        "row": Cell(label=f"{row.table}: {row.label}"),
        "mode": Cell(label=mode),
        **{name: Cell(getattr(alone, name) / GB) for name in STATES},
    }
    for recompute, kind in KINDS.items():
        needs = of_row.get((mode, recompute))
        if needs is None:
            continue
        parts = split_needs(needs, Settings(accumulates=True), IMAGES)
        cells[f"activations_{kind}"] = Cell(parts.activations / GB)
        for sharding in Sharding:
            images = largest_micro_batch(needs, _settings(sharding), card.free)
            cells[f"{sharding.name}_{kind}"] = Cell(images)
    return cells


# ---- Words


def _answers(row: MemoryRow, of_row: _OfRow, card: Card) -> Iterator[str]:
    """Yield a sentence per way to share a training: whether it fits, and how."""
    question = f"Does {row.label} train on {PROCESSES} cards of {card.gigabytes:g} GB?"
    share = -(-row.batch // PROCESSES)
    for sharding in Sharding:
        fitting = []
        for (mode, recompute), needs in sorted(of_row.items(), key=_in_order):
            images = min(share, largest_micro_batch(needs, _settings(sharding), card.free))
            if images:
                passes = -(-share // images)
                fitting.append(
                    f"in {mode} with activations {KINDS[recompute]}, {_count(images, 'image')} at "
                    f"once and {_count(passes, 'pass', 'passes')} per step"
                )
        if fitting:
            yield f"{question} {sharding}: yes, {'; '.join(fitting)}."
        else:
            least = min(_least(needs, sharding) for needs in of_row.values())
            yield (
                f"{question} {sharding}: no, one image needs at least {least / GB:.1f} GB, and "
                f"{card.free / GB:.1f} GB of a card are free."
            )
    yield f"A step of {row.label} is {row.batch} images, which are {share} on each card."


def _in_order(item: tuple[tuple[str, bool], Needs]) -> tuple[int, bool]:
    (mode, recompute), _ = item
    return MODES.index(mode), recompute


def _count(number: int, singular: str, plural: str = "images") -> str:
    return f"{number} {singular if number == 1 else plural}"


def _least(needs: Needs, sharding: Sharding) -> int:
    """Return the bytes of one image at a time."""
    return split_needs(needs, _settings(sharding), 1).total


def _general_notes(card: Card, untraced: Sequence[str]) -> list[str]:
    notes = [
        "Networks are trained on latents of ImageNet at 256 pixels, those of Table 2 at 512; of a "
        "cascade this is the base model.",
        "A GB is 10^9 bytes. Parameters, gradients, AdamW's two moments and the average are "
        "float32 in both modes, since bf16 is autocast.",
        "Activations are what else is alive at the peak of a forward and a backward pass of the "
        "trainer. They were traced without a GPU, with the operators and casts of one; attention "
        "and a recurrence count as one fused kernel each.",
        f"Images at once: the largest micro-batch of {PROCESSES} processes, 0 if none fits; "
        f"{RESERVE:.0%} of a card stay free for what no trace sees, such as the context, "
        "workspaces of libraries and fragmentation. This share is assumed.",
        f"{Sharding.OPTIMISER}: each process keeps its part of AdamW's moments (shard_optimizer in "
        f"slurm/site.toml). Fully sharded: each keeps its part of everything (fully_shard there), "
        "and has five times a block's parameters whole for a while, and what is no block for the "
        "step, as measured on a CPU.",
    ]
    if untraced:
        notes.append(
            f"Not traced yet: {', '.join(untraced)}. `experiments/efficiency.py --memory` goes on."
        )
    return notes


def _require_room(row: MemoryRow, of_row: _OfRow, card: Card) -> None:
    """Raise ValueError unless one image of a row fits a card under some setting."""
    settings = [(needs, sharding) for needs in of_row.values() for sharding in Sharding]
    needs, sharding = min(settings, key=lambda setting: _least(*setting))
    least = _least(needs, sharding)
    if least > card.free:
        raise ValueError(
            f"a budget of {card.gigabytes:g} GB, of which {card.free / GB:.2f} GB are free, holds "
            f"no image of {row.label}: {least / GB:.2f} GB are the least ({sharding} on "
            f"{PROCESSES} processes, {needs.precision}, activations {KINDS[needs.recompute]}); "
            "raise --budget or select other rows with --rows"
        )
