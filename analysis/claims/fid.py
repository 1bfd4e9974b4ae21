"""Verdicts on values, ratios and differences of FID. No torch.

By our own trainings at a claim's scale if they are recorded, and otherwise from the paper's
tables. Scores of two protocols are never judged together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.claims.finding import (
    Evidence,
    Finding,
    Subject,
    check_consistency,
    means,
    open_finding,
    published_number,
)
from analysis.claims.orders import judge_order, look_up_pairs
from analysis.query import ReferenceStore, scores_of
from analysis.tables.conditions import same_conditions
from experiments.ablation import TABLE_4
from experiments.declared.protocols import IMAGENET256
from experiments.engine.records.comparison import clashes
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim, half_digit
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict
from experiments.engine.specs.spec import Evaluate, canonical
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLES

# the digits of a checkpoint's SHA-256 that are printed
SHA_DIGITS = 12


@dataclass(frozen=True)
class OwnScores:
    """Our scores of subjects under their published conditions, all by one protocol."""

    # of every subject; empty if they cannot be judged
    records: list[list[Record]]
    # why they cannot be judged
    reason: str = ""


def _own_scores(subjects: Sequence[str], store: ReferenceStore) -> OwnScores:
    records = [_scores_of_subject(Subject.parse(subject), store) for subject in subjects]
    missing = [subject for subject, scores in zip(subjects, records, strict=True) if not scores]
    if missing:
        return OwnScores([], f"not scored on ImageNet here: {' and '.join(missing)}")

    fields = clashes([record for scores in records for record in scores], records[0])
    if fields:
        return OwnScores(
            [],
            f"our records are not compared, since scored by another protocol ({', '.join(fields)})",
        )
    return OwnScores(records)


def _scores_of_subject(subject: Subject, store: ReferenceStore) -> list[Record]:
    """Scores of our trainings; else of published weights, if no number of steps is named."""
    table = TABLES[1 if subject.resolution == 256 else 2]
    published = store.published(table.published, table.key)
    for row in table.rows:
        if row.backbone and subject.matches(published[row.published or ""]):
            numbers = published[row.published or ""]
            protocol = same_conditions(numbers, subject.resolution)
            trained = scores_of(row, protocol, store)
            if trained or numbers["train_steps"]:
                return trained
            return _scores_of_weights(evaluate_stage(row, protocol, 0), store)
    return []


def _scores_of_weights(stage: Evaluate, store: ReferenceStore) -> list[Record]:
    """The newest score of published weights of a stage's network, measured as the stage says."""
    wanted = canonical(stage, full=True)

    def fits(record: Record) -> bool:
        spec = record.spec
        return (
            record.kind == "evaluate"
            and record.status == "done"
            and spec["train"]["kind"] == "Checkpoint"
            and all(spec.get(key) == wanted[key] for key in wanted if key != "train")
            and spec["train"]["backbone"] == wanted["train"]["backbone"]
        )

    fitting = [record for record in store.all_records() if fits(record)]
    newest = sorted(fitting, key=lambda record: record.utc)[-1:]
    store.note(newest)
    return newest


def judge_fid(claim: Claim, store: ReferenceStore) -> Finding:
    """A printed FID beside ours."""
    fid = published_number(claim["subject"], "fid", store)
    if fid is None:
        return open_finding("the paper's tables hold no such row")
    own = _own_scores([claim["subject"]], store)
    if not own.records:
        return Finding(
            Evidence.PUBLISHED,
            f"{fid:.2f}",
            check_consistency(fid, claim["value"]),
            f"the table repeats it; {own.reason}",
            "one run, none given",
        )

    # ours, with its error
    (records,) = own.records
    (mean,) = means("fid", own.records)
    error = mean.width * mean.value
    printed = float(claim["value"])
    verdict = Verdict.NOT_REACHED
    if abs(mean.value - printed) <= error + half_digit(claim["value"]):
        verdict = Verdict.REPRODUCED
    elif mean.value < printed:
        verdict = Verdict.LOWER_THAN_CLAIMED

    repeated = len(records) > 1
    return Finding(
        Evidence.MEASURED,
        f"{mean.value:.2f}",
        _with_seeds(Judgement(verdict), repeated),
        f"FID-50K of {_describe_weights(records[0])}; the paper's tables {fid:.2f}",
        _interval(mean.value, error, repeated),
        True,
        tuple(records),
    )


def _describe_weights(record: Record) -> str:
    sha256 = record.spec["train"].get("sha256")
    if sha256:
        return f"the published weights {sha256[:SHA_DIGITS]}, sampled and scored here"
    return "our training by the row's published recipe"


def judge_fid_ratio(claim: Claim, store: ReferenceStore) -> Finding:
    """A printed ratio of two FIDs beside ours."""
    subjects = [claim["subject"], claim["baseline"]]
    ours, other = (published_number(subject, "fid", store) for subject in subjects)
    if ours is None or other is None:
        return open_finding("the paper's tables hold no such row")
    table = f"Table 1: {other:g} over {ours:g}"
    own = _own_scores(subjects, store)
    if not own.records:
        return Finding(
            Evidence.PUBLISHED,
            f"{other / ours:.2f}",
            check_consistency(other / ours, claim["value"]),
            f"{table}; {own.reason}",
            "one run each, none given",
        )

    better, worse = means("fid", own.records)
    ratio = worse.value / better.value
    effect = Effect(
        value=ratio,
        error=ratio * math.hypot(better.width, worse.width),
        none=1.0,
        basis=f"FID-50K of our trainings on imagenet256: {worse.value:.2f} over "
        f"{better.value:.2f}; {table}",
        records=own.records,
        repeated=any(len(records) > 1 for records in own.records),
    )
    return _judge_effect(claim, effect)


def judge_cca(claim: Claim, store: ReferenceStore) -> Finding:
    """The difference that channel attention makes to FID; without ours, the order of losses."""
    published = store.published("table4.csv", ("variant",))
    without, full = (float(published[name]["fid"]) for name in ("w/o CCA", "DiCo-S"))
    difference = without - full
    table = (
        f"Table 4 gives {difference:.2f} points "
        f"({check_consistency(difference, claim['value'])}), a ratio of {without / full:.2f}"
    )
    pairs = [("w/o CCA", "DiCo-S")]
    found = look_up_pairs(TABLE_4, pairs, IMAGENET256, store)
    if found.reason is not None:
        return judge_order(TABLE_4, pairs, table, store)

    records = [found.scores["DiCo-S"], found.scores["w/o CCA"]]
    better, worse = means("fid", records, spread=found.spread)
    effect = Effect(
        value=worse.value - better.value,
        error=math.hypot(better.value * better.width, worse.value * worse.width),
        none=0.0,
        basis=f"FID-50K of our trainings on imagenet256: {worse.value:.2f} without, "
        f"{better.value:.2f} with CCA; {table}",
        records=records,
        repeated=found.spread is not None,
    )
    return _judge_effect(claim, effect)


@dataclass(frozen=True)
class Effect:
    """A ratio or a difference of ours."""

    value: float
    error: float
    # its value if both sides are equal
    none: float
    # what was set against what
    basis: str
    records: Sequence[Sequence[Record]]
    # whether a training was repeated with other seeds
    repeated: bool


def _judge_effect(claim: Claim, effect: Effect) -> Finding:
    """Our effect beside the claimed one."""
    printed = float(claim["value"])
    more = "more" if effect.value > printed else "less"
    if abs(effect.value - effect.none) <= effect.error:
        judgement = Judgement(Verdict.NOT_RESOLVED)
    elif effect.value < effect.none:
        judgement = Judgement(Verdict.AGAINST)
    elif abs(effect.value - printed) <= effect.error + half_digit(claim["value"]):
        judgement = Judgement(Verdict.REPRODUCED)
    else:
        judgement = Judgement(Verdict.SAME_DIRECTION, (f"{more} than claimed",))

    return Finding(
        Evidence.MEASURED,
        f"{effect.value:.2f}",
        _with_seeds(judgement, effect.repeated),
        effect.basis,
        _interval(effect.value, effect.error, effect.repeated),
        True,
        tuple(record for records in effect.records for record in records),
    )


def _with_seeds(judgement: Judgement, repeated: bool) -> Judgement:
    return judgement if repeated else judgement.qualified(Qualifier.ONE_SEED)


def _interval(value: float, error: float, repeated: bool) -> str:
    level = "95 %" if repeated else "two sampling errors"
    return f"{level}: {value - error:.2f} to {value + error:.2f}"
