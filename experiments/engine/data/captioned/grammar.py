"""The captions of two digits on a canvas, and what each of them says. Standard library only.

A caption names one digit, which lies in the middle, or two, of which one lies left of the other or
above it. Of some pairs no image is ever trained on, while their mirror images are: a network that
binds words to places by what it has seen paints the mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

NAME = "digits_text"
# Right of and below, too: the first-named digit then lies in either place.
RELATIONS_NAME = "digits_text_relations"
NAMES = (NAME, RELATIONS_NAME)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", *DIGITS, "left", "of", "above", "right", "below")
TOKENS = 9  # a caption's words after the begin, and padding
# What tells tables of these words from others: `Vocabulary(WORDS).digest()`.
VOCABULARY = "f53cc4449550d2af"

SIZE = 16  # of the canvas
CELL = 8  # side of a digit
MIDDLE, LEFT, RIGHT, TOP, BOTTOM = (4, 4), (4, 0), (4, 8), (0, 4), (8, 4)
# Corners of the digits that are named first and second, by the words between them.
PLACES = {
    "left of": (LEFT, RIGHT),
    "above": (TOP, BOTTOM),
    "right of": (RIGHT, LEFT),
    "below": (BOTTOM, TOP),
}
# (second - first) mod 10 of the pairs that are held out.
HELD_OUT = (1, 4)


class Group(Enum):
    """What a caption is to a training."""

    SINGLE = "single"
    SEEN = "seen"
    HELD_OUT = "held_out"


@dataclass(frozen=True)
class Caption:
    """A caption and the cells that it names."""

    text: str
    # The digits in the order of their words, and the row and column where each begins.
    digits: tuple[int, ...]
    corners: tuple[tuple[int, int], ...]

    @property
    def group(self) -> Group:
        """What the caption is to a training."""
        if len(self.digits) == 1:
            return Group.SINGLE
        first, second = self.digits
        return Group.HELD_OUT if (second - first) % 10 in HELD_OUT else Group.SEEN


@cache
def captions_of(name: str) -> tuple[Caption, ...]:
    """Return the captions of a set in the order of their indices.

    Raises:
        ValueError: no set has this name.
    """
    if name not in NAMES:
        raise ValueError(f"no captions are known of set {name!r}; known: {', '.join(NAMES)}")
    relations = list(PLACES)[: 4 if name == RELATIONS_NAME else 2]
    singles = [Caption(f"a {word}", (digit,), (MIDDLE,)) for digit, word in enumerate(DIGITS)]
    pairs = [
        Caption(f"a {DIGITS[first]} {relation} a {DIGITS[second]}", (first, second), corners)
        for relation in relations
        for corners in (PLACES[relation],)
        for first in range(10)
        for second in range(10)
    ]
    return (*singles, *pairs)
