"""What a claim is found to be, and what all rules of judging share. No torch.

Evidence, from strong to weak: counted (a network here, exactly), measured here (at the claim's scale), measured at reduced
scale (the digits protocol, three seeds; of speed a CPU in place of the claim's GPU), published data only (the paper's tables checked against its words), not yet.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import half_digit
from experiments.engine.reporting.statistics import pooled, reach, scaled

COUNTED, MEASURED, REDUCED, PUBLISHED, NOT_YET = LEVELS = (
    "counted", "measured here", "measured at reduced scale", "published data only", "not yet",
)  # fmt: skip
VERDICTS = {  # the words of verdicts, and what they mean
    "reproduced": "the printed value within our error and its last digit, or the order with every difference resolved",
    "same direction": "as the claim says, but not by its printed value or not in every pair resolved",
    "not reached": "our FID is above the printed one by more than our error",
    "lower than claimed": "it is below it by more than that",
    "not to the printed digit": "counted exactly, and it rounds to another figure",
    "not resolved": "our error is larger than the difference",
    "against the claim": "resolved the other way",
    "mixed": "parts of it one way, parts the other",
    "holds": "a speed-up of at least the printed one, within two errors and its last digit, in every numeric mode that was timed",
    "holds only as published": "in the authors' mode of timing alone; or in the modes named",
    "does not hold": "in no mode that was timed",
    "consistent": "the paper's own tables give what its words say; nothing was run",
    "inconsistent": "they give something else",
    "on this CPU": "of speed, a proxy; same, no or other direction: all that can be said where its scan has no fused kernel",
    "one seed": "the spread over trainings is unknown, and the error is that of sampling alone, where there is one",
    "open": "nothing here bears on it yet",
}


@dataclass(frozen=True)
class Finding:
    """`value` with `error` in words; `basis` says what was set against what."""

    evidence: str
    value: str
    verdict: str
    basis: str
    error: str = ""
    records: tuple[Record, ...] = ()


def published(name: str, column: str, store: ReferenceStore) -> float | None:
    """A number of Table 1 or 2 for a subject such as `DiCo-XL@256 cfg` or `DiG-XL/2@256 400K`."""
    resolution = name.partition("@")[2].partition(" ")[0]
    for row in store.rows("table1.csv" if resolution == "256" else "table2.csv"):
        if is_of(row, name) and row[column]:
            return float(row[column])
    return None


def is_of(row: dict[str, str], name: str) -> bool:
    """Whether a row of Table 1 or 2 is that of a subject."""
    model, _, rest = name.partition("@")
    state = rest.partition(" ")[2]
    fits = {"": True, "cfg": row["cfg"] == "yes"}.get(
        state, row["train_steps"] == state.replace("K", "000")
    )
    return row["model"] == model and fits


def consistent(value: float, printed: str) -> str:
    return (
        "consistent"
        if abs(value - float(printed)) <= half_digit(printed) + 1e-9
        else f"inconsistent: {value:.2f}, not {printed}"
    )


@dataclass(frozen=True)
class Mean:
    """Mean over training seeds, of FID a geometric one, and `width`, half of its relative 95 % interval: Student's over seeds where
    any are repeated, else twice the sampling error of one."""

    value: float
    width: float


def means(
    name: str,
    groups: Sequence[Sequence[Record]],
    comparisons: int = 1,
    spread: tuple[float, int] | None = None,
) -> list[Mean]:
    """ValueError where a single seed has no sampling error."""
    values = [[record.values for record in records] for records in groups]
    spread = spread or pooled(name, values)
    made = []
    for records, found in zip(groups, values, strict=True):
        value = math.exp(statistics.fmean(scaled(name, found)))
        if spread is None and found[0].get(f"{name}_se") is None:
            raise ValueError(
                f"record {records[0].name} has one seed and no sampling error of {name}"
            )
        width = (
            reach(spread, 2 * len(found), 2 * len(found), comparisons)
            if spread
            else 2 * found[0][f"{name}_se"] / value
        )
        made.append(Mean(value, width))
    return made


def direction(signs: Sequence[int]) -> str:
    """Of comparisons that the claim says are positive; 0 is one that is not resolved."""
    resolved = [sign for sign in signs if sign]
    if not resolved:
        return "not resolved"
    return (
        "against the claim"
        if min(resolved) < 0
        else "reproduced"
        if len(resolved) == len(signs)
        else f"same direction, {len(resolved)} of {len(signs)} resolved"
    )
