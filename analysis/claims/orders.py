"""Verdicts on claims that rows of a table have an order, by scores and by throughput. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from analysis.claims.finding import (
    Evidence,
    Finding,
    Mean,
    judge_direction,
    means,
    open_finding,
    sign_of,
)
from analysis.evidence.pairs import Pair, PairVerdict, trained
from analysis.evidence.pairs import pairs as evidence_pairs
from analysis.query import ReferenceStore, rankable
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import CIFAR10_16, DIGITS, IMAGENET256
from experiments.engine.records.score_names import ranking_score
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.statistics import Spread, pool_spread
from experiments.engine.reporting.verdict import Judgement, Qualifier
from experiments.engine.specs.rows import Table
from experiments.engine.specs.stages import Protocol, timing_stage

# Labels of two rows, the one with the higher FID first.
Pairs = Sequence[tuple[str, str]]

# Where the rows were not scored at the claim's scale, the first of these decides whose rows have
# repeated seeds.
REDUCED = (CIFAR10_16, DIGITS)

STRUCTURES = ("iso.", "iso.&skip", "U-shape")
KERNELS = ("DiCo-S", "DWC 5x5", "DWC 7x7")


def judge_structures(claim: Claim, store: ReferenceStore) -> Finding:
    """Whether DiCo scores better than DiT in every structure of Table 3."""
    pairs = [(f"DiT ({name})", f"DiCo ({name})") for name in STRUCTURES]
    ordered = _count_ordered(TABLE_3, pairs, "fid", store)
    paper = f"Table 3 has this order by FID in {ordered} of {len(pairs)}"
    return judge_order(TABLE_3, pairs, paper, store)


def judge_kernels(claim: Claim, store: ReferenceStore) -> Finding:
    """Whether larger kernels score better and run slower.

    Throughput decides too if the scores are measured at the claim's scale.
    """
    pairs = list(zip(KERNELS, KERNELS[1:], strict=False))
    timings = _kernel_timings(store)
    paper = _describe_kernels(pairs, timings, store)
    finding = judge_order(TABLE_4, pairs, paper, store)
    if finding.evidence is not Evidence.MEASURED:
        return finding
    if not timings.on_gpu:
        judgement = finding.judgement.qualified("by FID", "throughput not measured on a GPU")
        return replace(finding, judgement=judgement)

    # throughput must fall from kernel to kernel
    speeds = timings.speeds
    slower = judge_direction(
        [
            sign_of(first - second, 2 * math.hypot(first_error, second_error))
            for (first, first_error), (second, second_error) in zip(
                speeds, speeds[1:], strict=False
            )
        ]
    )
    judgement = finding.judgement
    if not _agrees(judgement, slower):
        judgement = judgement.qualified("by FID", f"by throughput {slower}")
    records = (*finding.records, *timings.records)
    return replace(finding, judgement=judgement, records=records)


def _agrees(judgement: Judgement, other: Judgement) -> bool:
    """Whether two judgements are the same, seeds apart."""
    shared = judgement.qualifiers[: len(other.qualifiers)]
    return judgement.verdict is other.verdict and shared == other.qualifiers


@dataclass(frozen=True)
class KernelTimings:
    """The timings of Table 4's kernels that are recorded, on a GPU if all of them are."""

    on_gpu: bool
    records: tuple[Record, ...]

    @property
    def speeds(self) -> list[tuple[float, float]]:
        """Throughput relative to the baseline, and its spread."""
        return [
            (record.values["relative"], record.values["relative_spread"]) for record in self.records
        ]


def _kernel_timings(store: ReferenceStore) -> KernelTimings:
    rows = [TABLE_4.row(name) for name in KERNELS]
    timings = {}
    for device in ("cuda", "cpu"):
        stages = [timing_stage(row, TABLE_4.baseline, device) for row in rows]
        records = [store.reference.latest(stage) for stage in stages]
        timings[device] = tuple(record for record in records if record)
    on_gpu = len(timings["cuda"]) == len(rows)
    return KernelTimings(on_gpu, timings["cuda" if on_gpu else "cpu"])


def _describe_kernels(pairs: Pairs, timings: KernelTimings, store: ReferenceStore) -> str:
    """What the paper's table says of the kernels, and how fast they are here."""
    by_fid = _count_ordered(TABLE_4, pairs, "fid", store)
    by_throughput = _count_ordered(TABLE_4, pairs, "throughput_img_s", store)
    speeds = ", ".join(f"{speed:.2f} ±{spread:.2f}" for speed, spread in timings.speeds)
    device = "a GPU" if timings.on_gpu else "the CPU"
    return (
        f"Table 4 has the order in {by_fid} of {len(pairs)} by FID and {by_throughput} of "
        f"{len(pairs)} by throughput; relative throughput on {device} here: {speeds or 'none'}"
    )


def _count_ordered(table: Table, pairs: Pairs, column: str, store: ReferenceStore) -> int:
    """The number of pairs whose second row has the lower published number."""
    published = store.published(table.published, table.key)
    keys = {row.label: row.published or "" for row in table.rows}

    def number(label: str) -> float:
        return float(published[keys[label]][column])

    return sum(number(first) > number(second) for first, second in pairs)


@dataclass(frozen=True)
class PairScores:
    """The scores of the rows of some pairs under one protocol."""

    # by label
    scores: dict[str, list[Record]] = field(default_factory=dict)
    # over seeds, pooled over the table
    spread: Spread | None = None
    # why the pairs cannot be judged; '' if nothing was run, None if they can be
    reason: str | None = None


def look_up_pairs(
    table: Table, pairs: Pairs, protocol: Protocol, store: ReferenceStore
) -> PairScores:
    """Look up the scores of pairs at the claim's scale, where a single training counts."""
    all_scores, refused = rankable(table.rows, protocol, store)
    by_label = {row.label: records for row, records in zip(table.rows, all_scores, strict=True)}
    spread = pool_spread(
        ranking_score(protocol.features).key,
        [[record.values for record in records] for records in all_scores],
    )
    scores = {label: by_label[label] for pair in pairs for label in pair}

    # rows that were scored otherwise, or not at all
    clashing = sorted(scores.keys() & refused.keys())
    if clashing:
        listed = "; ".join(f"{label} ({', '.join(refused[label])})" for label in clashing)
        return PairScores(reason=f"not compared, since scored by another protocol: {listed}")
    missing = [label for label, records in scores.items() if not records]
    if len(missing) == len(scores):
        return PairScores(reason="")
    if missing:
        reason = f"not judged on {protocol.name}: no record of {', '.join(missing)}"
        return PairScores(reason=reason)
    return PairScores(scores, spread)


def judge_order(table: Table, pairs: Pairs, paper: str, store: ReferenceStore) -> Finding:
    """Ratios of scores that the claim says are above 1.

    By Fréchet distances at the claim's scale, and otherwise by the loss on held-out images at a
    reduced one.

    Args:
        table: declares the rows.
        pairs: labels of rows, the one with the higher distance first.
        paper: what the paper's own table says.
        store: the committed records.
    """
    found = look_up_pairs(table, pairs, IMAGENET256, store)
    if found.reason is None:
        return _judge_pairs(pairs, found, IMAGENET256, Evidence.MEASURED, paper)
    if found.reason:
        paper += f"; {found.reason}"
    for protocol in REDUCED:
        judged = {(pair.a, pair.b): pair for pair in evidence_pairs(table, protocol, store)}
        if judged:
            return _judge_within_seeds(table, pairs, judged, protocol, paper, store)
    return open_finding(f"{paper}; no reduced protocol has two seeds of every row")


def _judge_within_seeds(
    table: Table,
    pairs: Pairs,
    judged: Mapping[tuple[str, str], Pair],
    protocol: Protocol,
    paper: str,
    store: ReferenceStore,
) -> Finding:
    """Held-out losses, rows compared within seeds; a pair that is not settled is not resolved."""
    ratios, signs = [], []
    for worse, better in pairs:
        pair = judged.get((better, worse)) or judged[worse, better]
        factors = [1 + percent / 100 for percent in (pair.difference, pair.low, pair.high)]
        ratio, low, high = factors
        if pair.a == worse:
            ratio, low, high = 1 / ratio, 1 / high, 1 / low
        ratios.append((ratio, low, high))
        is_resolved = (low > 1 or high < 1) and pair.verdict is not PairVerdict.NOT_SETTLED
        signs.append((1 if ratio > 1 else -1) if is_resolved else 0)

    side = trained(table, protocol, store)
    listed = ", ".join(f"{worse} over {better}" for worse, better in pairs)
    ranges = ", ".join(f"{low:.4f} to {high:.4f}" for _, low, high in ratios)
    word = "ratio" if len(ratios) == 1 else "ratios"
    return Finding(
        Evidence.REDUCED,
        f"{', '.join(f'{ratio:.4f}' for ratio, _, _ in ratios)} ({word})",
        judge_direction(signs),
        f"held-out loss on {protocol.name} after {protocol.recipe.steps} steps, each network at "
        f"its own learning rate, {len(side.complete_seeds)} seeds: {listed}; {paper}",
        f"95 %, all pairs of the table together: {ranges}",
        True,
        tuple(
            side.records[label][seed]
            for label in dict.fromkeys(label for pair in pairs for label in pair)
            for seed in side.complete_seeds
        ),
    )


def _judge_pairs(
    pairs: Pairs, found: PairScores, protocol: Protocol, evidence: Evidence, paper: str
) -> Finding:
    name = ranking_score(protocol.features).key
    labels = sorted(found.scores)
    groups = [found.scores[label] for label in labels]
    mean = dict(zip(labels, means(name, groups, len(pairs), found.spread), strict=True))
    ratios = [_ratio(mean[worse], mean[better]) for worse, better in pairs]

    # what is compared, then every ratio with its range
    listed = ", ".join(f"{worse} over {better}" for worse, better in pairs)
    word = "ratio" if len(ratios) == 1 else "ratios"
    value = ", ".join(f"{math.exp(ratio.log):.2f}" for ratio in ratios)
    ranges = ", ".join(
        f"{math.exp(ratio.log - ratio.width):.2f} to {math.exp(ratio.log + ratio.width):.2f}"
        for ratio in ratios
    )
    level = "95 %" if found.spread else "two sampling errors"

    judgement = judge_direction([sign_of(ratio.log, ratio.width) for ratio in ratios])
    if found.spread is None:
        judgement = judgement.qualified(Qualifier.ONE_SEED)
    return Finding(
        evidence,
        f"{value} ({word})",
        judgement,
        f"{name} on {protocol.name}, {listed}; {paper}",
        f"{level}: {ranges}",
        True,
        tuple(record for records in groups for record in records),
    )


@dataclass(frozen=True)
class _Ratio:
    """The logarithm of a ratio of two means, and half its interval."""

    log: float
    width: float


def _ratio(worse: Mean, better: Mean) -> _Ratio:
    return _Ratio(math.log(worse.value / better.value), math.hypot(worse.width, better.width))
