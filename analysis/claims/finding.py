"""What a claim is found to be, and what all rules of judging share. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from analysis.query import ReferenceStore
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import half_digit
from experiments.engine.reporting.statistics import Spread, mean_score, noise_bound, pool_spread
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict


class Evidence(Enum):
    """What a verdict rests on, from strong to weak."""

    # a network, exactly
    COUNTED = "counted"
    # at the claim's scale
    MEASURED = "measured here"
    # on small networks and images; of speed, on a CPU in place of the claim's GPU
    REDUCED = "measured at reduced scale"
    # the paper's tables, checked against its words
    PUBLISHED = "published data only"
    # by a model, before any measurement
    PREDICTED = "predicted"
    NOT_YET = "not yet"


MEANINGS: dict[Verdict | Qualifier, str] = {
    Verdict.REPRODUCED: "the printed value lies within our error and its last digit, or every "
    "difference of the order is resolved",
    Verdict.SAME_DIRECTION: "as the claim says, but not by its printed value, or not in every pair",
    Verdict.NOT_REACHED: "our FID is above the printed one by more than our error",
    Verdict.LOWER_THAN_CLAIMED: "our FID is below the printed one by more than our error",
    Verdict.NOT_TO_THE_DIGIT: "counted exactly, and it rounds to another figure",
    Verdict.NOT_RESOLVED: "our error is larger than the difference",
    Verdict.AGAINST: "resolved the other way",
    Verdict.MIXED: "parts of it are resolved one way, parts the other",
    Verdict.HOLDS: "the speed-up is at least the printed one in every numeric mode that was timed, "
    "within two errors and the last digit",
    Verdict.HOLDS_AS_PUBLISHED: "in the authors' mode of timing alone",
    Verdict.HOLDS_IN_SOME_MODES: "in the numeric modes that are named",
    Verdict.DOES_NOT_HOLD: "in no mode that was timed",
    Verdict.CONSISTENT: "the paper's own tables give what its words say; nothing was run",
    Verdict.INCONSISTENT: "the paper's own tables give something else",
    Verdict.PREDICTED: "by a model of published peaks alone; nothing was run",
    Verdict.OPEN: "nothing here bears on it yet",
    Qualifier.CPU_PROXY: "a CPU stands in for the claim's GPU",
    Qualifier.CPU_SCAN_LOOP: "only the direction can be said",
    Qualifier.ONE_SEED: "the spread over trainings is unknown; an error is that of sampling alone",
}


@dataclass(frozen=True)
class Finding:
    """What a claim is found to be."""

    evidence: Evidence
    # in words; '' for none
    value: str
    judgement: Judgement
    # what was set against what
    basis: str
    # in words; '' for none
    error: str = ""
    # whether the error was computed from the records
    error_measured: bool = False
    # the records behind the value
    records: tuple[Record, ...] = ()


def open_finding(basis: str) -> Finding:
    """The finding of a claim on which nothing bears yet, and why."""
    return Finding(Evidence.NOT_YET, "", Judgement(Verdict.OPEN), basis)


# How the names of tables of the second version begin, and the one that holds a resolution.
VERSION_2 = "v2-"
AT_SIZE = {1024: "v2-11"}


@dataclass(frozen=True)
class Subject:
    """What a claim is about, as claims.csv writes it.

    Such as `DiCo-XL@256 cfg`, `DiG-XL/2@256 400K` or, of a table of the second version,
    `DiCo-DWC@256 v2-3`.
    """

    model: str
    # pixels
    resolution: int
    # 'cfg' with guidance, the training steps ('400K'), or ''
    state: str
    # the table of the paper's second version ('v2-3') that holds it; '' for one of the first
    table: str = ""

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read a subject."""
        model, _, rest = text.partition("@")
        resolution, _, state = rest.partition(" ")
        if state.startswith(VERSION_2):
            return cls(model, int(resolution), "", state)
        return cls(model, int(resolution), state, AT_SIZE.get(int(resolution), ""))

    @property
    def file(self) -> str:
        """The published table that holds it."""
        number = self.table or (1 if self.resolution == 256 else 2)
        return f"table{number}.csv"

    def matches(self, row: dict[str, str]) -> bool:
        """Whether a row of that table is the subject's."""
        if row["model"] != self.model:
            return False
        if self.state == "cfg":
            return row["cfg"] == "yes"
        return not self.state or row["train_steps"] == self.state.replace("K", "000")


def published_number(subject: str, column: str, store: ReferenceStore) -> float | None:
    """A number of the subject's table; None if the paper does not print it."""
    parsed = Subject.parse(subject)
    for row in store.rows(parsed.file):
        if parsed.matches(row) and row[column]:
            return float(row[column])
    return None


def check_consistency(value: float, printed: str) -> Judgement:
    """Whether a number of the paper's tables rounds to the one in its words."""
    if abs(value - float(printed)) <= half_digit(printed) + 1e-9:
        return Judgement(Verdict.CONSISTENT)
    return Judgement(Verdict.INCONSISTENT, (f"{value:.2f} against the printed {printed}",))


@dataclass(frozen=True)
class Mean:
    """The mean of a score over training seeds, of FID a geometric one."""

    value: float
    # half of the relative 95 % interval: Student's over seeds if any are repeated, else twice the
    # sampling error of one
    width: float


def means(
    name: str,
    groups: Sequence[Sequence[Record]],
    comparisons: int = 1,
    spread: Spread | None = None,
) -> list[Mean]:
    """The mean score of every group of seeds.

    Args:
        name: the score.
        groups: the records of every group, one per seed.
        comparisons: the number of differences that are looked at together.
        spread: over seeds; None takes that of the groups.

    Raises:
        ValueError: if a single seed has no sampling error.
    """
    all_values = [[record.values for record in records] for records in groups]
    spread = spread or pool_spread(name, all_values)

    # Without a spread over seeds, the sampling error of the one seed gives the width.
    made = []
    for records, values in zip(groups, all_values, strict=True):
        value = math.exp(mean_score(name, values))
        if spread:
            width = noise_bound(spread, 2 * len(values), 2 * len(values), comparisons)
        else:
            error = values[0].get(f"{name}_se")
            if error is None:
                raise ValueError(
                    f"record {records[0].name} has one seed and no sampling error of {name}"
                )
            width = 2 * error / value
        made.append(Mean(value, width))
    return made


def sign_of(difference: float, error: float) -> int:
    """1 or -1 for a difference beyond its error, 0 for one that is not resolved."""
    if abs(difference) <= error:
        return 0
    return 1 if difference > 0 else -1


def judge_direction(signs: Sequence[int]) -> Judgement:
    """The verdict on differences that the claim says are positive; 0 is one not resolved."""
    resolved = [sign for sign in signs if sign]
    if not resolved:
        return Judgement(Verdict.NOT_RESOLVED)
    if min(resolved) < 0:
        return Judgement(Verdict.AGAINST)
    if len(resolved) == len(signs):
        return Judgement(Verdict.REPRODUCED)
    return Judgement(Verdict.SAME_DIRECTION, (f"{len(resolved)} of {len(signs)} resolved",))
