"""Every score that records hold: its key, how it is printed, and what it compares with.

Standard library only. A score's key is never taken apart: what it means stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

INCEPTION = "inception"
# Small classifiers whose features stand in for Inception's. Judges saw the training part alone,
# and their reference is the test part.
DIGITS_JUDGE = "digits_judge"
CIFAR_JUDGE = "cifar_judge"
JUDGES = (DIGITS_JUDGE, CIFAR_JUDGE)
# A judge of cells reads what captions describe.
DIGITS_TEXT = "digits_text"
CLASSIFIERS = ("digits", "cifar_classifier", *JUDGES)


class Better(Enum):
    """Which values of a score are the better ones."""

    LOWER = "lower"
    HIGHER = "higher"


@dataclass(frozen=True)
class Score:
    """One score under one feature extractor."""

    # Its key in a record's values.
    key: str
    # Its printed name, to which Inception's scores add the number of images.
    name: str
    better: Better
    # The column of published tables that it compares with; empty for none.
    paper: str = ""
    # The heading of that column in our tables.
    short: str = ""
    # Decimals in tables.
    digits: int = 2
    # Whether its spread over training seeds grows with its value.
    log_scaled: bool = False
    # What distinguishes it from the score of the same name; empty for none.
    variant: str = ""
    # Whether tables print our value of it.
    in_tables: bool = True
    # Whether it is of compositions that no training has seen.
    held_out: bool = False
    # The key of its standard deviation over subsets; empty for none.
    deviation: str = ""

    @property
    def error(self) -> str:
        """The key of its standard error, in records that hold one."""
        return f"{self.key}_se"


@dataclass(frozen=True)
class ClassifierScores:
    """The scores on the features of a small classifier, in the order of the tables."""

    distance: Score
    inception: Score
    precision: Score
    recall: Score
    agreement: Score

    @property
    def all(self) -> tuple[Score, ...]:
        return (self.distance, self.inception, self.precision, self.recall, self.agreement)

    @property
    def beside_loss(self) -> tuple[Score, ...]:
        """The held-out loss, by which rows are ranked, and what samples look like beside it."""
        return (HELDOUT_LOSS, self.distance, self.precision, self.recall, self.agreement)


HELDOUT_LOSS = Score("heldout_loss", "held-out loss", Better.LOWER, digits=5, log_scaled=True)
# Of networks that predict tokens, which have no noise to predict.
HELDOUT_CROSS_ENTROPY = Score(
    "heldout_cross_entropy", "held-out cross-entropy", Better.LOWER, digits=4, log_scaled=True
)


def _classifier_scores(features: str) -> ClassifierScores:
    """Declare the scores of a classifier: a Fréchet distance on its features is no FID."""
    distance = f"fd_{features}"
    return ClassifierScores(
        Score(distance, distance, Better.LOWER, "fid", digits=1, log_scaled=True),
        Score(f"is_{features}", "is", Better.HIGHER, "is", digits=1),
        Score(f"precision_{features}", "precision", Better.HIGHER, "precision"),
        Score(f"recall_{features}", "recall", Better.HIGHER, "recall"),
        Score("agreement", "agreement", Better.HIGHER),
    )


CLASSIFIER_SCORES = {features: _classifier_scores(features) for features in CLASSIFIERS}
FID = Score("fid", "FID", Better.LOWER, "fid", "FID", digits=1, log_scaled=True)
FID_CORRECTED = Score("fid_corrected", "FID", Better.LOWER, digits=1, variant="no bias")
SFID = Score("sfid", "sFID", Better.LOWER, "sfid", "sFID", in_tables=False)
IS = Score("is", "IS", Better.HIGHER, "is", "IS", digits=1)
IS_SHUFFLED = Score("is_shuffled", "IS", Better.HIGHER, variant="order shuffled", in_tables=False)
PRECISION = Score("precision", "precision", Better.HIGHER, "precision", "P")
RECALL = Score("recall", "recall", Better.HIGHER, "recall", "R")
PRECISION_HALF = Score(
    "precision_half", "precision", Better.HIGHER, variant="half precision", in_tables=False
)
RECALL_HALF = Score(
    "recall_half", "recall", Better.HIGHER, variant="half precision", in_tables=False
)
DENSITY = Score("density", "density", Better.HIGHER, in_tables=False)
COVERAGE = Score("coverage", "coverage", Better.HIGHER, in_tables=False)
KID = Score("kid", "KID", Better.LOWER, deviation="kid_sd", in_tables=False)
MIND = Score("mind", "MIND", Better.LOWER, in_tables=False)
INCEPTION_SCORES = (
    FID,
    FID_CORRECTED,
    SFID,
    IS,
    IS_SHUFFLED,
    PRECISION,
    RECALL,
    PRECISION_HALF,
    RECALL_HALF,
    DENSITY,
    COVERAGE,
    KID,
    MIND,
)

# What canvases show of their captions. Means over captions of one digit, of two digits that are
# trained on, and of two that are not.
FD_TEXT = Score("fd_digits_text", "fd_digits_text", Better.LOWER, "fid", digits=1, log_scaled=True)
FD_TEXT_HELD_OUT = Score(
    "fd_digits_text_held_out",
    "fd_digits_text",
    Better.LOWER,
    digits=1,
    log_scaled=True,
    variant="held out",
    held_out=True,
)
CAPTION_GROUPS = {"single": "single", "seen": "pairs seen", "held_out": "pairs held out"}
CAPTION_ATTRIBUTES = {
    "all": Better.HIGHER,
    "digit": Better.HIGHER,
    "layout": Better.HIGHER,
    "swapped": Better.LOWER,
}
CAPTION_SCORES = {
    (name, group): Score(
        f"{name}_{group}", f"{name}, {title}", better, digits=3, held_out=group == "held_out"
    )
    for group, title in CAPTION_GROUPS.items()
    for name, better in CAPTION_ATTRIBUTES.items()
}

# Scores on the class tokens of DINOv2, beside Inception's of the same images.
FD_DINOV2 = Score("fd_dinov2", "FD-DINOv2", Better.LOWER, in_tables=False)
PRECISION_DINOV2 = Score(
    "precision_dinov2", "precision", Better.HIGHER, variant="DINOv2", in_tables=False
)
RECALL_DINOV2 = Score("recall_dinov2", "recall", Better.HIGHER, variant="DINOv2", in_tables=False)
DENSITY_DINOV2 = Score(
    "density_dinov2", "density", Better.HIGHER, variant="DINOv2", in_tables=False
)
COVERAGE_DINOV2 = Score(
    "coverage_dinov2", "coverage", Better.HIGHER, variant="DINOv2", in_tables=False
)
DINOV2_SCORES = (
    FD_DINOV2,
    PRECISION_DINOV2,
    RECALL_DINOV2,
    DENSITY_DINOV2,
    COVERAGE_DINOV2,
)

# The published scores of the paper's tables, and of its table that has sFID too.
PAPER_SCORES = (FID, IS, PRECISION, RECALL)
PAPER_SCORES_WITH_SFID = (FID, SFID, IS, PRECISION, RECALL)

# By feature extractor, the scores that tables print; rows are ranked by the first.
TABLE_SCORES = {
    **{
        features: scores.beside_loss if features in JUDGES else scores.all
        for features, scores in CLASSIFIER_SCORES.items()
    },
    DIGITS_TEXT: (
        FD_TEXT,
        FD_TEXT_HELD_OUT,
        CAPTION_SCORES["all", "single"],
        *(score for (_, group), score in CAPTION_SCORES.items() if group != "single"),
    ),
    INCEPTION: tuple(score for score in INCEPTION_SCORES if score.in_tables),
}
SCORES = {
    score.key: score
    for scores in (
        *TABLE_SCORES.values(),
        INCEPTION_SCORES,
        DINOV2_SCORES,
        CAPTION_SCORES.values(),
        (HELDOUT_CROSS_ENTROPY,),
    )
    for score in scores
}


def validation_loss(values: Mapping[str, Any]) -> float:
    """Return the loss of a held-out record by which rates of one network are compared."""
    name = HELDOUT_LOSS.key if HELDOUT_LOSS.key in values else HELDOUT_CROSS_ENTROPY.key
    return float(values[name])


def distance_score(features: str) -> Score:
    """Return the Fréchet distance on these features, by which a sweep chooses."""
    if features == INCEPTION:
        return FID
    return FD_TEXT if features == DIGITS_TEXT else CLASSIFIER_SCORES[features].distance


def ranking_score(features: str) -> Score:
    """Return the score by which rows are compared under these features."""
    return TABLE_SCORES[features][0]


def counted_name(score: Score, num: int) -> str:
    """Return a score's printed name with its number of images: FID over 50000 is 'FID-50K'."""
    thousands = num >= 1000 and num % 1000 == 0
    return f"{score.name}-{num // 1000}K" if thousands else f"{score.name}-{num}"


def score_title(score: Score, features: str, num: int) -> str:
    """Return the heading of a score: with N for Inception's, such as 'FID-50K, no bias'."""
    if features != INCEPTION:
        return f"{score.name}, {score.variant}" if score.variant else score.name
    name = counted_name(score, num)
    return f"{name}, {score.variant}" if score.variant else name
