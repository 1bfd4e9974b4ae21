"""Tables of predictions: beside what the paper prints and what was measured. No torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.engine.records.store import RecordFolder
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.efficiency.predictions import (
    CLAIMS,
    CPU,
    MODEL,
    PAPER_CARD,
    Declared,
    Predictions,
    read_model,
)
from experiments.engine.reporting.efficiency.speed import AS_PUBLISHED
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet, SheetRow
from experiments.engine.reporting.verdict import Judgement, Verdict

MODES = ("fp32", "tf32", "bf16", AS_PUBLISHED)
ENDS = (
    "bound: at the peaks of the data sheets, where every operator takes the longer of its "
    "multiply-accumulates and its bytes. attained: at the shares of the peaks that were fitted to "
    "the paper's Table 1. Those are of the authors' kernels and layout, so the other modes are "
    "expected between the two. Operators are taken to be the same in all modes."
)


# ---- Cards


def predicted_sheet(
    task: str,
    declared: Sequence[Declared],
    predictions: Predictions,
    root: Path,
    source: RecordFolder,
) -> Sheet:
    """Return predicted images per second of a task on every card, beside paper and records.

    Args:
        task: rows of other tasks are left out.
        declared: what was predicted.
        predictions: as they are committed.
        root: the results folder of the predictions.
        source: the records of what was measured.
    """
    cards = list(dict.fromkeys(key[4] for key in predictions if key[4] != CPU))
    rows = [row for row in declared if row.task == task]
    sheet = Sheet(f"Predicted before any measurement: {task}, images per second", _columns(task))
    for row in rows:
        for card in cards:
            cells: SheetRow = {
                "row": Cell(label=_name_of(row)),
                "card": Cell(label=card),
            }
            for mode in MODES:
                cells |= _mode_cells(row, mode, card, predictions, source)
            if card == PAPER_CARD and row.published:
                cells |= _paper_cells(row, predictions)
            sheet.add_row(cells)

    sheet.note(NoteKind.SPEED, ENDS, *model_notes(root))
    if task == "forward":
        sheet.note(NoteKind.SPEED, *_error_notes(rows, predictions))
    return sheet


def _columns(task: str) -> list[Column]:
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("card", "card", kind=Kind.PROSE),
    ]
    for mode in MODES:
        for end in ("attained", "bound", "measured"):
            columns.append(Column(f"{mode}_{end}", end, mode))
    if task == "forward":
        columns.append(Column("paper_rate", "img/s", "paper"))
        columns.append(Column("paper_attained", "attained / paper", AS_PUBLISHED))
    return columns


def _name_of(row: Declared) -> str:
    """Return a row's label after its table; a claim's network has a label of its own."""
    return row.label if row.table == CLAIMS else f"{row.table}: {row.label}"


def _mode_cells(
    row: Declared, mode: str, card: str, predictions: Predictions, source: RecordFolder
) -> SheetRow:
    """Return both ends of a prediction, and what was measured on the card."""
    cells: SheetRow = {}
    prediction = predictions.get((row.table, row.label, row.task, mode, card))
    if prediction:
        cells[f"{mode}_attained"] = Cell(prediction.attained, digits=digits_of(prediction.attained))
        cells[f"{mode}_bound"] = Cell(prediction.bound, digits=digits_of(prediction.bound))
    record = source.latest(row.stages[mode]) if mode in row.stages else None
    if record and card in record.provenance["device"]:
        rate = record.values["images_per_s"]
        cells[f"{mode}_measured"] = Cell(rate, digits=digits_of(rate), records=(record,))
    return cells


def digits_of(value: float) -> int:
    """Return the decimals that leave three digits or more."""
    return max(0, 2 - math.floor(math.log10(value)))


def _paper_cells(row: Declared, predictions: Predictions) -> SheetRow:
    """Return the paper's figure, and the prediction divided by it."""
    assert row.published
    prediction = predictions.get((row.table, row.label, row.task, AS_PUBLISHED, PAPER_CARD))
    cells = {"paper_rate": Cell(row.published, digits=1)}
    if prediction:
        cells["paper_attained"] = Cell(prediction.attained / row.published)
    return cells


def model_notes(
    root: Path, name: str = MODEL, command: str = "`experiments/efficiency.py --predict`"
) -> list[str]:
    """Return when and by which constants the predictions were made, by the file of that name."""
    model = read_model(root, name)
    if not model:
        return [f"No predictions are committed; {command} makes them."]
    shares = ", ".join(
        f"{float(model[f'share_{name}']):.0%} of {what}"
        for name, what in (
            ("plain", "float32 arithmetic"),
            ("tensor", "tensor cores"),
            ("memory", "the bandwidth"),
        )
    )
    return [
        f"made {model['utc']} by commit {model['commit'][:12]}. attained: {shares}. An operator's "
        f"launch takes {1e6 * float(model['launch_s']):g} us, which is assumed.",
    ]


def _error_notes(rows: Sequence[Declared], predictions: Predictions) -> list[str]:
    """Return how far the predictions are from the paper's figures, by family or table."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        key = (row.table, row.label, row.task, AS_PUBLISHED, PAPER_CARD)
        if row.published and key in predictions:
            ratios = (
                predictions[key].attained / row.published,
                predictions[key].bound / row.published,
            )
            errors.setdefault(_group_of(row), []).append(ratios)

    notes = []
    for group, pairs in errors.items():
        attained, bound = ([pair[end] for pair in pairs] for end in (0, 1))
        notes.append(
            f"{group}, predicted over published: attained {_range(attained)}, bound "
            f"{_range(bound)}."
        )
    return notes


def _group_of(row: Declared) -> str:
    """Return the family of a row of Tables 1 and 2, and the table of other rows."""
    family = re.match(r"(.+?)-[SBLXH]+\b", row.label) if row.table in ("1", "2") else None
    return family.group(1) if family else f"Table {row.table}"


def _range(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.2f}"
    return f"{min(values):.2f} to {max(values):.2f} (median {middle:.2f})"


# ---- CPU


def cpu_sheet(
    declared: Sequence[Declared], predictions: Predictions, source: RecordFolder
) -> Sheet:
    """Return what the ceilings of a CPU let expect, beside what was measured on it."""
    titles = ("table", "row", "task")
    sheet = Sheet(
        "The model on a CPU: predicted from its measured ceilings, and measured",
        [
            *(Column(title, title, kind=Kind.PROSE) for title in titles),
            Column("bound", "bound", "img/s", digits=1),
            Column("measured", "measured", "img/s", digits=1),
            Column("ratio", "bound / measured"),
        ],
    )
    ratios = []
    for row in declared:
        prediction = predictions.get((row.table, row.label, row.task, "fp32", CPU))
        record = source.latest(row.stages["fp32"])
        if prediction is None or record is None:
            continue
        rate, own = record.values["images_per_s"], (record,)
        ratios.append(prediction.bound / rate)
        texts = {
            key: Cell(label=text)
            for key, text in zip(titles, (row.table, row.label, row.task), strict=True)
        }
        sheet.add_row(
            texts
            | {
                "bound": Cell(prediction.bound),
                "measured": Cell(rate, records=own),
                "ratio": Cell(ratios[-1], records=own),
            }
        )
    if ratios:
        sheet.note(NoteKind.SPEED, f"bound / measured: {_range(ratios)}. Nothing was fitted.")
    return sheet


# ---- Claims


def predicted_claims_sheet(claims: Sequence[Claim], predictions: Predictions, root: Path) -> Sheet:
    """Return what the model says of the paper's speed-ups, in equal numeric modes too."""
    columns = [Column("claim", "claim", kind=Kind.PROSE), Column("paper", "paper", digits=1)]
    for mode in MODES:
        columns += [Column(f"{mode}_{end}", end, mode) for end in ("attained", "bound")]
    columns.append(Column("verdict", "verdict", kind=Kind.PROSE))
    sheet = Sheet(f"Speed-ups of the paper, as the model has them on an {PAPER_CARD}", columns)
    for claim in claims:
        cells = claim_cells(claim, predictions)
        if cells:
            sheet.add_row(cells)
    sheet.note(NoteKind.SPEED, ENDS, *model_notes(root))
    return sheet


def claim_cells(claim: Claim, predictions: Predictions) -> SheetRow:
    """Return a claim's predicted ratios by mode; none if a network of it is not predicted."""
    cells: SheetRow = {}
    for mode in MODES:
        ours, theirs = (
            predictions.get((CLAIMS, claim[side], "forward", mode, PAPER_CARD))
            for side in ("subject", "baseline")
        )
        if ours is None or theirs is None:
            return {}
        cells[f"{mode}_attained"] = Cell(ours.attained / theirs.attained)
        cells[f"{mode}_bound"] = Cell(ours.bound / theirs.bound)
    return cells | {
        "claim": Cell(label=claim["id"]),
        "paper": Cell(float(claim["value"])),
        "verdict": Cell(label=str(Judgement(Verdict.PREDICTED))),
    }
