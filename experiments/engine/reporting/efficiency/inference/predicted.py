"""Predicted latency of one image and memory of inference: declared, written once, read. No torch.

`results/predictions/latency.csv` holds milliseconds of every row by numeric mode and card.
`inference.csv` holds lines of memory as `memory.csv` does, and `latency_model.csv` says when, from
which commit and by which constants the latencies were made.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.reporting.efficiency.memory import Line
from experiments.engine.reporting.efficiency.predictions import (
    FOLDER,
    MODEL,
    read_model,
    write_lines,
)
from experiments.engine.reporting.efficiency.roofline import Shares
from experiments.engine.specs.spec import Latency

LATENCY, INFERENCE, LATENCY_MODEL = "latency.csv", "inference.csv", "latency_model.csv"
# The numeric modes whose memory is traced; the others need what fp32 needs.
TRACED_MODES = ("fp32", "bf16")
SHARES = ("share_plain", "share_tensor", "share_memory")


@dataclass(frozen=True)
class LatencyRow:
    """A network of a table, whose latency is measured or predicted."""

    # Number of the table.
    table: str
    label: str
    # By numeric mode.
    stages: dict[str, Latency]


@dataclass(frozen=True)
class PredictedLatency:
    """A line of the file of latencies."""

    table: str
    row: str
    mode: str
    card: str
    # Milliseconds at the peaks, and at the attained shares of the peaks.
    bound: float
    attained: float


@dataclass(frozen=True)
class InferenceNeeds:
    """What memory the forward passes of a network or a system need."""

    table: str
    row: str
    mode: str
    # Bytes of parameters and buffers.
    weights: int
    # What is alive beside them; the highest line at a batch is the peak.
    lines: tuple[Line, ...]

    def peak(self, batch: int) -> int:
        """Return the most bytes that are alive at once at a batch."""
        return self.weights + max(line.at(batch) for line in self.lines)


# Of (table, row, mode, card).
PredictedLatencies = Mapping[tuple[str, str, str, str], PredictedLatency]
# Of (table, row, mode).
InferenceMemory = Mapping[tuple[str, str, str], InferenceNeeds]


def needs_in(mode: str, table: str, row: str, known: InferenceMemory) -> InferenceNeeds | None:
    """Return what a row needs in any numeric mode; None if it is not traced."""
    return known.get((table, row, mode if mode in TRACED_MODES else TRACED_MODES[0]))


def read_shares(root: Path) -> Shares:
    """Read the attained shares that were fitted for the predictions of throughput.

    Raises:
        ValueError: there are none.
    """
    model = read_model(root)
    if not model:
        raise ValueError(
            f"{FOLDER}/{MODEL} holds no attained shares to predict latency with; run "
            "experiments/efficiency.py --predict"
        )
    return Shares(*(float(model[name]) for name in SHARES))


def write_latencies(
    root: Path, latencies: Iterable[PredictedLatency], utc: str, commit: str
) -> None:
    """Write the latencies, and what they were made by, below a results folder."""
    fields = ("table", "row", "mode", "card", "bound_ms", "attained_ms")
    lines = [
        (p.table, p.row, p.mode, p.card, f"{p.bound:.5g}", f"{p.attained:.5g}") for p in latencies
    ]
    fitted = read_model(root)
    constants = [(name, fitted[name], f"as {MODEL} has it") for name in ("launch_s", *SHARES)]
    model = [
        ("utc", utc, "when the predictions were made"),
        ("commit", commit, "the code that made them"),
        *constants,
    ]
    write_lines(root / FOLDER / LATENCY, fields, lines)
    write_lines(root / FOLDER / LATENCY_MODEL, ("name", "value", "meaning"), model)


def read_latencies(root: Path) -> PredictedLatencies:
    """Read the latencies below a results folder; none if there is no file."""
    read = [
        PredictedLatency(
            line["table"],
            line["row"],
            line["mode"],
            line["card"],
            float(line["bound_ms"]),
            float(line["attained_ms"]),
        )
        for line in _read(root / FOLDER / LATENCY)
    ]
    return {(p.table, p.row, p.mode, p.card): p for p in read}


def write_inference(root: Path, needs: Iterable[InferenceNeeds]) -> None:
    """Write the memory of inference, one line of the file for every traced line."""
    fields = ("table", "row", "precision", "weights", "fixed", "per_image")
    lines = [
        (each.table, each.row, each.mode, each.weights, line.fixed, line.per_image)
        for each in needs
        for line in each.lines
    ]
    write_lines(root / FOLDER / INFERENCE, fields, lines)


def read_inference(root: Path) -> InferenceMemory:
    """Read the memory of inference below a results folder; nothing if there is no file."""
    needs: dict[tuple[str, str, str], InferenceNeeds] = {}
    for line in _read(root / FOLDER / INFERENCE):
        key = (line["table"], line["row"], line["precision"])
        before = needs[key].lines if key in needs else ()
        traced = Line(int(line["fixed"]), int(line["per_image"]))
        needs[key] = InferenceNeeds(*key, int(line["weights"]), (*before, traced))
    return needs


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
