"""How the scores of files are printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from experiments.engine.records.score_names import (
    COVERAGE,
    COVERAGE_DINOV2,
    DENSITY,
    DENSITY_DINOV2,
    FD_DINOV2,
    FID,
    FID_CORRECTED,
    IS,
    IS_SHUFFLED,
    KID,
    MIND,
    PRECISION,
    PRECISION_DINOV2,
    PRECISION_HALF,
    RECALL,
    RECALL_DINOV2,
    RECALL_HALF,
    SFID,
    Score,
    counted_name,
)


@dataclass(frozen=True)
class Line:
    """How a score is printed."""

    score: Score
    # What is said of it after its value.
    remark: str = ""
    digits: int = 4
    # Whether it depends on the number of rows in the reference.
    by_neighbours: bool = False


LINES = (
    Line(FID),
    Line(FID_CORRECTED, ", without its finite-N bias"),
    Line(SFID),
    Line(IS),
    Line(IS_SHUFFLED, ", order shuffled"),
    Line(PRECISION, by_neighbours=True),
    Line(RECALL, by_neighbours=True),
    Line(PRECISION_HALF, ", ADM's half precision", by_neighbours=True),
    Line(RECALL_HALF, ", ADM's half precision", by_neighbours=True),
    Line(DENSITY, by_neighbours=True),
    Line(COVERAGE, by_neighbours=True),
    Line(KID, digits=6),
    Line(MIND),
    Line(FD_DINOV2),
    Line(PRECISION_DINOV2, ", DINOv2", by_neighbours=True),
    Line(RECALL_DINOV2, ", DINOv2", by_neighbours=True),
    Line(DENSITY_DINOV2, ", DINOv2", by_neighbours=True),
    Line(COVERAGE_DINOV2, ", DINOv2", by_neighbours=True),
)


def text_of_scores(name: str, values: dict[str, Any], reference: str) -> str:
    """Return the lines of a file of images: its scores, then its warnings."""
    lines = [f"{name} against {reference}"]
    for line in LINES:
        if line.score.key in values and not math.isnan(values[line.score.key]):
            lines.append(_text_of_score(line, values))
    if "nfe" in values:
        lines.append(f"  network evaluations per image: {values['nfe']}")
    lines.append(_text_of_repeats(values))
    return "\n".join([*lines, *(f"  warning: {text}" for text in values["warnings"])])


def _text_of_score(line: Line, values: dict[str, Any]) -> str:
    value = values[line.score.key]
    text = f"  {counted_name(line.score, values['num']):15} {value:.{line.digits}f}"

    # Its error, or the deviation of a single subset.
    error = values.get(line.score.error)
    if error is not None and not math.isnan(error):
        text += f" ± {error:.4f}"
    elif line.score.deviation:
        text += f" (deviation over subsets {values[line.score.deviation]:.6f})"

    # What else it depends on.
    text += line.remark
    if line.by_neighbours:
        text += f", k 3, {values['num_reference']} reference rows"
    if line.score is MIND:
        text += f", over {values['mind_rows']} rows of each"
    return text


def _text_of_repeats(values: dict[str, Any]) -> str:
    """Return the line that counts repeated images and near copies."""
    text = f"  repeated images {values['repeated']}, near copies {values['near_copies']}"
    if "in_reference" in values:
        text += (
            f"; of the reference {values['in_reference']}, near copies {values['near_reference']}"
        )
    return text
