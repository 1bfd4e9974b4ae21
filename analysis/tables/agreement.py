"""How well the order of rows under a small protocol agrees with the paper's. No torch."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from analysis.query import ReferenceStore, rankable
from analysis.tables.ranks import rank_rows
from experiments.declared.protocols import DIGITS
from experiments.engine.records.score_names import Score, ranking_score
from experiments.engine.records.store import Record
from experiments.engine.reporting.statistics import (
    LEVEL,
    Values,
    mean_score,
    noise_bound,
    pool_spread,
)
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.stages import Protocol, timing_stage

if TYPE_CHECKING:
    import numpy as np

# redrawn sets of means, and random orders
DRAWS = 2000
# the number of rows up to which every order is counted
EXACT = 7
# a normal distribution's standard deviation over half its interquartile range
NORMAL = 1.4826

# A set of means, or of orders, per row.
Draws = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Agreement:
    """The rank correlation of our means over seeds with the paper's column."""

    # rows with a score
    rows: int
    # the number of seeds per row, or its range
    seeds: str
    # Kendall's tau-b
    tau: float
    # Spearman's rho
    rho: float
    # the central 95 % of tau over fresh draws of our seeds' noise
    low: float
    high: float
    # the share of orders that agree at least as well as ours
    chance: float
    # the mean tau of two such draws with each other, which no comparison can exceed
    ceiling: float
    # repeated runs from which that noise is known
    freedom: int


def measure_agreement(
    score: Score, table: Table, store: ReferenceStore, protocol: Protocol = DIGITS
) -> Agreement | None:
    """How a score orders a table's rows; None without repeats or with fewer than three rows."""
    published = store.published(table.published, table.key)
    scored = _scored(table, store, protocol)
    spread = pool_spread(score.key, [values for _, values in scored])
    if spread is None or len(scored) < 3:
        return None

    # the paper's numbers, our means, and the noise in our means
    paper = [float(published[row.published or ""][score.paper]) for row, _ in scored]
    means = [mean_score(score.key, values) for _, values in scored]
    errors = [spread.deviation / math.sqrt(len(values)) for _, values in scored]
    dice = random.Random(0)

    def redraw() -> list[float]:
        return [dice.gauss(mean, error) for mean, error in zip(means, errors, strict=True)]

    # the order of these calls fixes the draws
    low, high = central_range(kendall_taus([redraw() for _ in range(DRAWS)], [paper]))
    chance = chance_of(means, paper, dice)
    pairs = [(redraw(), redraw()) for _ in range(DRAWS)]
    ceilings = kendall_taus([first for first, _ in pairs], [second for _, second in pairs])
    return Agreement(
        rows=len(scored),
        seeds=_describe_range([len(values) for _, values in scored]),
        tau=kendall_tau(means, paper),
        rho=spearman_rho(means, paper),
        low=low,
        high=high,
        chance=chance,
        ceiling=statistics.fmean(ceilings),
        freedom=spread.freedom,
    )


def _scored(
    table: Table, store: ReferenceStore, protocol: Protocol
) -> list[tuple[Row, list[dict[str, float]]]]:
    """Rows with the values of their scores, as far as they may be ranked together."""
    scores = rankable(table.rows, protocol, store).scores
    return [
        (row, [record.values for record in records])
        for row, records in zip(table.rows, scores, strict=True)
        if records
    ]


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; nan if one of the two has no order."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def spearman_rho(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho; nan if one of the two has no order."""
    from scipy.stats import spearmanr

    if len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    return float(spearmanr(a, b).statistic)


def kendall_taus(a: Draws, b: Draws) -> list[float]:
    """Kendall's tau-b of each pair of rows; `b` may be a single row.

    It equals scipy's. Thousands of draws take milliseconds this way, and half a minute that way.
    """
    import numpy as np

    # signs of all differences within a row: 1 and -1, 0 for a tie
    signs_a, signs_b = _signs(a), _signs(b)
    concordance = (signs_a * signs_b).sum(axis=1)
    untied = np.abs(signs_a).sum(axis=1) * np.abs(signs_b).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (concordance / np.sqrt(untied)).tolist()


def _signs(rows: Draws) -> np.ndarray:
    """The sign of every difference of two values of a row: (draws, pairs)."""
    import numpy as np

    values = np.asarray(rows, dtype=float)
    first, second = np.triu_indices(values.shape[1], k=1)
    return np.sign(values[:, first] - values[:, second])


def central_range(values: Sequence[float]) -> tuple[float, float]:
    """The range in which all but LEVEL of the values lie."""
    ordered = sorted(values)
    tail = int(len(values) * LEVEL / 2)
    return ordered[tail], ordered[-1 - tail]


def chance_of(ours: Sequence[float], paper: Sequence[float], dice: random.Random) -> float:
    """The share of orders whose tau with the paper's is at least that of ours.

    All orders are counted up to EXACT rows, and otherwise DRAWS random ones.
    """
    (tau,) = kendall_taus([ours], [paper])
    threshold = tau - 1e-12
    if len(ours) <= EXACT:
        taus = kendall_taus(list(itertools.permutations(ours)), [paper])
        return sum(other >= threshold for other in taus) / len(taus)

    # the order at hand is one of the random ones
    taus = kendall_taus([dice.sample(ours, len(ours)) for _ in range(DRAWS)], [paper])
    return (1 + sum(other >= threshold for other in taus)) / (1 + DRAWS)


def _describe_range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


# Labels of two rows, the one with the lower Fréchet distance first.
Pair = tuple[str, str]


@dataclass
class Pairs:
    """What the seeds resolve of the order of a table's rows."""

    resolved: list[Pair] = field(default_factory=list)
    not_resolved: list[Pair] = field(default_factory=list)
    # resolved against the order of the paper's FID
    against: list[Pair] = field(default_factory=list)
    # the number of rows whose rank is certain
    certain: int = 0


def resolve_pairs(table: Table, store: ReferenceStore, protocol: Protocol = DIGITS) -> Pairs | None:
    """Sort all pairs of rows with a score; None without repeated seeds."""
    score = ranking_score(protocol.features)
    published = store.published(table.published, table.key)
    scored = _scored(table, store, protocol)
    all_values: list[Values] = [values for _, values in scored]
    spread = pool_spread(score.key, all_values)
    if spread is None:
        return None

    # a difference counts at LEVEL for all pairs together
    total = len(scored) * (len(scored) - 1) // 2
    ranks = rank_rows(score.key, score.better, all_values)
    pairs = Pairs(certain=sum(rank is not None and rank.is_certain for rank in ranks))
    for (row_a, values_a), (row_b, values_b) in itertools.combinations(scored, 2):
        ours = mean_score(score.key, values_a) - mean_score(score.key, values_b)
        fids = [float(published[row.published or ""][score.paper]) for row in (row_a, row_b)]
        pair = (row_a.label, row_b.label) if ours < 0 else (row_b.label, row_a.label)

        if abs(ours) <= noise_bound(spread, len(values_a), len(values_b), total):
            pairs.not_resolved.append(pair)
            continue
        pairs.resolved.append(pair)
        if ours * (fids[0] - fids[1]) <= 0:
            pairs.against.append(pair)
    return pairs


@dataclass(frozen=True)
class SpeedAgreement:
    """Kendall's tau of the CPU's relative throughput with the paper's on an A100."""

    tau: float
    # the central 95 % of tau over fresh draws of each row's own spread over rounds
    low: float
    high: float
    # the timings, one per row
    records: tuple[Record, ...]


def measure_speed_agreement(table: Table, store: ReferenceStore) -> SpeedAgreement | None:
    """How the CPU orders a table's rows by throughput; None with fewer than three rows timed."""
    published = store.published(table.published, table.key)
    records, paper = [], []
    for row in table.rows:
        record = store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        if record:
            records.append(record)
            paper.append(float(published[row.published or ""]["throughput_img_s"]))
    if len(records) < 3:
        return None

    # every row varies by its own spread over rounds of timing
    ratios = [record.values["relative"] for record in records]
    errors = [NORMAL * record.values["relative_spread"] for record in records]
    redraw = _redrawer(ratios, errors)
    low, high = central_range(kendall_taus([redraw() for _ in range(DRAWS)], [paper]))
    return SpeedAgreement(kendall_tau(ratios, paper), low, high, tuple(records))


def _redrawer(means: Sequence[float], errors: Sequence[float]) -> Callable[[], list[float]]:
    """A function that draws a set of values around their means."""
    dice = random.Random(0)
    return lambda: [dice.gauss(mean, error) for mean, error in zip(means, errors, strict=True)]
