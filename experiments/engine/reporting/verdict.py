"""What a claim is found to be: a verdict, and what restricts it. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """The verdicts on claims, as they are printed."""

    REPRODUCED = "reproduced"
    SAME_DIRECTION = "same direction"
    NOT_REACHED = "not reached"
    LOWER_THAN_CLAIMED = "lower than claimed"
    NOT_TO_THE_DIGIT = "not to the printed digit"
    RESOLVED = "resolved"
    NOT_RESOLVED = "not resolved"
    AGAINST = "against the claim"
    MIXED = "mixed"
    HOLDS = "holds"
    HOLDS_AS_PUBLISHED = "holds only as published"
    HOLDS_IN_SOME_MODES = "holds only in some modes"
    DOES_NOT_HOLD = "does not hold"
    CONSISTENT = "consistent"
    INCONSISTENT = "inconsistent"
    PREDICTED = "predicted"
    OPEN = "open"
    # of speed on a CPU whose scan has no fused kernel: all that can be said is the direction
    NO_DIRECTION = "no direction"
    OTHER_DIRECTION = "other direction"
    # of tables of speed claims, where nothing was judged
    NOT_MEASURED = "not measured"
    NOT_MEASURABLE = "not measurable"
    NOT_COUNTED = "not counted"


class Qualifier(Enum):
    """What restricts a verdict; a restriction that is not listed here is a sentence of its own."""

    ONE_SEED = "one seed"
    CPU_PROXY = "on this CPU (a proxy)"
    CPU_SCAN_LOOP = "on this CPU, whose scan has no fused kernel"


@dataclass(frozen=True)
class Judgement:
    """A verdict with its restrictions, in the order in which they are printed."""

    verdict: Verdict
    qualifiers: tuple[Qualifier | str, ...] = ()

    def qualified(self, *qualifiers: Qualifier | str) -> Judgement:
        """The same verdict with further restrictions."""
        return Judgement(self.verdict, (*self.qualifiers, *qualifiers))

    def __str__(self) -> str:
        return ", ".join([self.verdict.value, *_texts(self.qualifiers)])


def _texts(qualifiers: Iterable[Qualifier | str]) -> list[str]:
    return [text.value if isinstance(text, Qualifier) else text for text in qualifiers]
