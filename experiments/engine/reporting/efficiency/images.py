"""What one guided image costs, by one rule for systems that draw it in different ways. No torch.

A diffusion network is evaluated many times on all pixels. An autoregressive one draws each scale
once, from a cache of the coarser ones. Both are given a second row without the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.engine.records.store import Record, RecordFolder, Store
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

# Published scores and speed-ups, by the file that holds a system's.
PUBLISHED = ("code.csv", "table8.csv", "tablerelated.csv")
SPEED_UPS = PUBLISHED[0]


@dataclass(frozen=True)
class Drawn:
    """A system at one resolution, and how often it calls its network for a row of an image."""

    label: str
    # In pixels of the image.
    resolution: int
    cost: Cost
    # Evaluations of a diffusion network; None: the network draws scale by scale, and its record
    # holds the count of an image.
    evaluations: int | None = None
    # Label of the system whose count is divided by this one's; "": none.
    against: str = ""
    # What makes pixels of a diffusion network's latents.
    autoencoder: str = "SD's VAE, f8"

    @property
    def decoded_by(self) -> str:
        """Name what makes pixels."""
        return "its tokenizer" if self.evaluations is None else self.autoencoder


COLUMNS = (
    Column("system", "system", kind=Kind.PROSE),
    Column("resolution", "pixels"),
    Column("drawn", "drawn in", kind=Kind.PROSE),
    Column("autoencoder", "autoencoder", kind=Kind.PROSE),
    Column("params", "params, M", digits=1, topic=Topic.COUNTS),
    Column("guided", "guided", "T MACs of an image", digits=3, topic=Topic.COUNTS),
    Column("unguided", "unguided", "T MACs of an image", digits=3, topic=Topic.COUNTS),
    Column("decoder", "decoder", "T MACs of an image", digits=3, topic=Topic.COUNTS),
    Column("saving", "times cheaper, counted", "against VAR-d30", topic=Topic.COUNTS),
    Column("speed_up", "times faster, paper", "against VAR-d30", topic=Topic.COUNTS),
    Column("fid", "FID", "paper", topic=Topic.COUNTS),
)


def images_sheet(
    systems: Sequence[Drawn], store: Store, source: RecordFolder | None = None
) -> Sheet:
    """Return the cost of one image of every system, and what two networks save.

    Args:
        source: the records to read; by default those of this results folder.
    """
    source = source or store.here
    speed_ups = store.published(SPEED_UPS, ("model",))
    scores = published_scores(store)
    counts = {(each.label, each.resolution): source.latest(each.cost) for each in systems}
    sheet = Sheet("The cost of one image, guided, by one rule for all systems", list(COLUMNS))
    for each in systems:
        record = counts[each.label, each.resolution]
        guided = tera_macs(each, record, guided=True)
        parent = GAP
        if each.against:
            whole = next(other for other in systems if other.label == each.against)
            parent = tera_macs(whole, counts[whole.label, whole.resolution], guided=True)
        sheet.add_row(
            {
                "system": Cell(label=each.label),
                "resolution": Cell(label=str(each.resolution)),
                "drawn": Cell(label=_describe(each)),
                "autoencoder": Cell(label=each.decoded_by),
                "params": _value(record, "params_total", 1e6),
                "guided": guided,
                "unguided": tera_macs(each, record, guided=False),
                "decoder": _value(record, "macs_decoder", 1e12),
                "saving": _ratio(parent, guided),
                "speed_up": published_cell(speed_ups.get(each.label, {}).get("speed_up", "")),
                "fid": published_cell(scores.get(each.label, "") if each.resolution == 256 else ""),
            }
        )

    _add_notes(sheet, speed_ups)
    return sheet


def published_scores(store: Store) -> dict[str, str]:
    """Return the published FID of guided samples at 256 pixels, as printed, by system."""
    return {
        model: row["fid"]
        for file in PUBLISHED
        for model, row in store.published(file, ("model",)).items()
    }


def tera_macs(system: Drawn, record: Record | None, guided: bool) -> Cell:
    """Return an image's multiply-accumulates in T; a gap without a record."""
    if system.evaluations is None:
        return _value(record, "macs_image_guided" if guided else "macs_image", 1e12)
    rows = 2 if guided else 1
    return _value(record, "macs_core", 1e12 / (rows * system.evaluations))


def _value(record: Record | None, name: str, unit: float) -> Cell:
    if record is None or name not in record.values:
        return GAP
    return Cell(record.values[name] / unit, records=(record,))


def _ratio(whole: Cell, part: Cell) -> Cell:
    if whole.value is None or not part.value:
        return GAP
    return Cell(whole.value / part.value, records=(*whole.records, *part.records))


def _describe(system: Drawn) -> str:
    if system.evaluations is not None:
        return f"{system.evaluations} evaluations"
    if system.cost.refiner is None:
        return "scales"
    return f"scales, the first {system.cost.drafted_scales} by the large network"


def _add_notes(sheet: Sheet, published: dict[str, dict[str, str]]) -> None:
    # What is counted.
    sheet.note(
        NoteKind.COUNTS,
        "T MACs: 10^12 multiply-accumulates of convolutions, linear layers and matrix products. "
        "guided: every evaluation sees a second row without the label, as all of these codes "
        "compute it. Decoders stand apart; the VAE of latents is not counted. SiT's own code calls "
        "its network twice a step, which is not needed and not counted.",
    )
    sheet.note(
        NoteKind.COUNTS,
        "VAR and CoDe: all scales in turn with a cache of keys and values, with the convolutions "
        "that the tokenizer makes between scales. As in the authors' code, every scale computes "
        "its modulation anew, and CoDe's head reads all tokens of its first call.",
    )

    # What is published beside it.
    sources = "; ".join(f"{model}: {cells['source']}" for model, cells in published.items())
    sheet.note(
        NoteKind.COUNTS,
        "times cheaper: the count of VAR-d30 over this one's. Published speed-ups are of "
        "seconds without the decoder, and were not measured here. CoDe's FID is of fine-tuned "
        f"weights. {sources}.",
    )
