"""Predicted throughput as data: declared, written once, read for tables. No torch.

`results/predictions/throughput.csv` holds the predictions. `model.csv` beside it says when, from
which commit and by which constants they were made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.records.files import written_whole
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.roofline import LAUNCH, Device, Shares
from experiments.engine.specs.spec import Timing

FOLDER = "predictions"
THROUGHPUT, MODEL = "throughput.csv", "model.csv"
# The card of the paper's throughputs.
PAPER_CARD = "A100"
# In place of a card: the machine whose ceilings were measured.
CPU = "CPU"
# In place of a table's number: the networks that claims about speed compare.
CLAIMS = "claims"


@dataclass(frozen=True)
class Declared:
    """What is predicted of a row in one task."""

    # Number of the table, or `CLAIMS`.
    table: str
    label: str
    task: str
    # By numeric mode.
    stages: dict[str, Timing]
    # Images per second that the paper prints of a forward pass; None: it prints none.
    published: float | None = None


@dataclass(frozen=True)
class Prediction:
    """A line of the file."""

    table: str
    row: str
    task: str
    mode: str
    batch: int
    card: str
    # Images per second at the peaks.
    bound: float
    # Images per second at the attained shares of the peaks.
    attained: float


# Of (table, row, task, mode, card).
Predictions = dict[tuple[str, str, str, str, str], Prediction]


def read_cards(store: Store) -> list[Device]:
    """Read the published peaks of all cards; an operation is half a multiply-accumulate."""
    values: dict[str, dict[str, float]] = {}
    for line in store.published("cards.csv", ("card", "quantity")).values():
        values.setdefault(line["card"], {})[line["quantity"]] = float(line["value"])
    return [
        Device(
            card,
            0.5e12 * of["fp32"],
            1e9 * of["bandwidth"],
            0.5e12 * of["tf32"],
            0.5e12 * of["bf16"],
        )
        for card, of in values.items()
    ]


def write_predictions(
    root: Path, predictions: Iterable[Prediction], shares: Shares, utc: str, commit: str
) -> None:
    """Write both files below a results folder."""
    fields = ("table", "row", "task", "mode", "batch", "card", "bound_img_s", "attained_img_s")
    lines = [
        (p.table, p.row, p.task, p.mode, p.batch, p.card, f"{p.bound:.5g}", f"{p.attained:.5g}")
        for p in predictions
    ]
    fitted = "fitted to the forward passes of Table 1 on the paper's card, in its numeric mode"
    model = [
        ("utc", utc, "when the predictions were made"),
        ("commit", commit, "the code that made them"),
        ("launch_s", LAUNCH, "seconds of an operator's launch, assumed"),
        ("share_plain", shares.plain, f"of the peak of float32 without tensor cores, {fitted}"),
        ("share_tensor", shares.tensor, f"of the peak of tensor cores, {fitted}"),
        ("share_memory", shares.memory, f"of the bandwidth, {fitted}"),
    ]
    write_lines(root / FOLDER / THROUGHPUT, fields, lines)
    write_lines(root / FOLDER / MODEL, ("name", "value", "meaning"), model)


def write_lines(path: Path, fields: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write a file of comma-separated values, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    with written_whole(path) as file:
        file.write(text.getvalue().encode())


def read_predictions(root: Path) -> Predictions:
    """Read the predictions below a results folder; none if there is no file."""
    path = root / FOLDER / THROUGHPUT
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    read = [
        Prediction(
            line["table"],
            line["row"],
            line["task"],
            line["mode"],
            int(line["batch"]),
            line["card"],
            float(line["bound_img_s"]),
            float(line["attained_img_s"]),
        )
        for line in lines
    ]
    return {(p.table, p.row, p.task, p.mode, p.card): p for p in read}


def read_model(root: Path, name: str = MODEL) -> dict[str, str]:
    """Read when and how the predictions were made; nothing if there are none."""
    path = root / FOLDER / name
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {line["name"]: line["value"] for line in csv.DictReader(file)}
