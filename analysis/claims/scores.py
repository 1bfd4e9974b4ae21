"""Verdicts on the paper's claims about scores and losses: by our own trainings at a claim's scale where they are recorded, else
on digits, else from the paper's tables and logs. Scores of two protocols are never judged together. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from analysis.claims.finding import (
    MEASURED,
    NOT_YET,
    PUBLISHED,
    REDUCED,
    Finding,
    consistent,
    direction,
    is_of,
    means,
    published,
)
from analysis.claims.scaling import scaling
from analysis.query import ReferenceStore, rankable, scores_of
from analysis.tables.conditions import same_conditions
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.records.comparison import clashes
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim, half_digit
from experiments.engine.reporting.lookup import SCORES
from experiments.engine.reporting.statistics import pooled
from experiments.engine.specs.rows import Table
from experiments.engine.specs.spec import Evaluate, canonical
from experiments.engine.specs.stages import Protocol, evaluate_stage, timing_stage
from experiments.main_results import TABLES

Pairs = Sequence[tuple[str, str]]


def _own(subjects: Sequence[str], store: ReferenceStore) -> tuple[list[list[Record]], str]:
    """Our scores of each subject under its published conditions, all by one protocol; else none, and why."""
    found = [_of_subject(subject, store) for subject in subjects]
    if missing := [
        subject for subject, records in zip(subjects, found, strict=True) if not records
    ]:
        return [], f"not scored on ImageNet here: {' and '.join(missing)}"
    if fields := clashes([record for records in found for record in records], found[0]):
        return [], f"our records are not compared, scored by another protocol ({', '.join(fields)})"
    return found, ""


def _of_subject(subject: str, store: ReferenceStore) -> list[Record]:
    """Of our trainings, else of the published weights, which stand for a row that names no number of steps."""
    resolution = int(subject.partition("@")[2].partition(" ")[0])
    table = TABLES[1 if resolution == 256 else 2]
    papers = store.published(table.published, table.key)
    for row in table.rows:
        if row.backbone and is_of(papers[row.published], subject):
            protocol = same_conditions(papers[row.published], resolution)
            stage = evaluate_stage(row, protocol, 0)
            return scores_of(row, protocol, store) or (
                [] if papers[row.published]["train_steps"] else _of_weights(stage, store)
            )
    return []


def _of_weights(stage: Evaluate, store: ReferenceStore) -> list[Record]:
    """The newest score of published weights of a stage's network, drawn and measured as the stage says."""
    wanted = canonical(stage, full=True)

    def fits(record: Record) -> bool:
        spec = record.spec
        same = all(spec.get(key) == wanted[key] for key in wanted if key != "train")
        return (
            record.status == "done"
            and spec["train"]["kind"] == "Checkpoint"
            and same
            and spec["train"]["backbone"] == wanted["train"]["backbone"]
        )

    found = sorted(
        (record for record in store.all_records() if record.kind == "evaluate" and fits(record)),
        key=lambda record: record.utc,
    )[-1:]
    store.note(found)
    return found


def fid_value(claim: Claim, store: ReferenceStore) -> Finding:
    fid = published(claim["subject"], "fid", store)
    if fid is None:
        return Finding(NOT_YET, "", "open", "the paper's tables hold no such row")
    found, why = _own([claim["subject"]], store)
    if not found:
        return Finding(
            PUBLISHED,
            f"{fid:.2f}",
            consistent(fid, claim["value"]),
            f"the table repeats it; {why}",
            "one run, none given",
        )
    (records,), repeated = found, len(found[0]) > 1
    (mean,) = means("fid", found)
    reached = abs(mean.value - float(claim["value"])) <= mean.width * mean.value + half_digit(
        claim["value"]
    )
    verdict = (
        "reproduced"
        if reached
        else "lower than claimed"
        if mean.value < float(claim["value"])
        else "not reached"
    )
    weights = records[0].spec["train"].get("sha256")
    whose = (
        f"the published weights {weights[:12]}, drawn and scored here"
        if weights
        else "our training by the row's published recipe"
    )
    return Finding(
        MEASURED,
        f"{mean.value:.2f}",
        verdict + ", one seed" * (not repeated),
        f"FID-50K of {whose}; the paper's tables {fid:.2f}",
        _interval(mean.value, mean.width * mean.value, repeated),
        tuple(records),
    )


def fid_ratio(claim: Claim, store: ReferenceStore) -> Finding:
    ours, other = (published(claim[side], "fid", store) for side in ("subject", "baseline"))
    found, why = _own([claim["subject"], claim["baseline"]], store)
    table = f"Table 1: {other:g} over {ours:g}"
    if not found:
        return Finding(
            PUBLISHED,
            f"{other / ours:.2f}",
            consistent(other / ours, claim["value"]),
            f"{table}; {why}",
            "one run each, none given",
        )
    better, worse = means("fid", found)
    ratio = worse.value / better.value
    return _effect(
        claim,
        ratio,
        ratio * math.hypot(better.width, worse.width),
        1.0,
        f"FID-50K of our trainings on imagenet256: {worse.value:.2f} over {better.value:.2f}; {table}",
        found,
        any(len(records) > 1 for records in found),
    )


def cca(claim: Claim, store: ReferenceStore) -> Finding:
    fid = {
        name: float(row["fid"]) for name, row in store.published("table4.csv", ("variant",)).items()
    }
    paper = fid["w/o CCA"] - fid["DiCo-S"]
    table = f"Table 4 gives {paper:.2f} points ({consistent(paper, claim['value'])}), a ratio of {fid['w/o CCA'] / fid['DiCo-S']:.2f}"
    pairs = [("w/o CCA", "DiCo-S")]
    scores, spread, why = _of_rows(TABLE_4, pairs, IMAGENET256, store)
    if why is not None:
        return _order(TABLE_4, pairs, table, store)
    found = [scores["DiCo-S"], scores["w/o CCA"]]
    better, worse = means("fid", found, spread=spread)
    error = math.hypot(better.value * better.width, worse.value * worse.width)
    return _effect(
        claim,
        worse.value - better.value,
        error,
        0.0,
        f"FID-50K of our trainings on imagenet256: {worse.value:.2f} without, {better.value:.2f} with CCA; {table}",
        found,
        spread is not None,
    )


def _effect(
    claim: Claim,
    value: float,
    error: float,
    nothing: float,
    basis: str,
    found: Sequence[Sequence[Record]],
    repeated: bool,
) -> Finding:
    """A ratio or difference of ours beside the claimed one; `nothing` is its value where both are equal."""
    printed = float(claim["value"])
    if abs(value - nothing) <= error:
        verdict = "not resolved"
    elif value < nothing:
        verdict = "against the claim"
    elif abs(value - printed) <= error + half_digit(claim["value"]):
        verdict = "reproduced"
    else:
        verdict = f"same direction, {'more' if value > printed else 'less'} than claimed"
    return Finding(
        MEASURED,
        f"{value:.2f}",
        verdict + ", one seed" * (not repeated),
        basis,
        _interval(value, error, repeated),
        tuple(record for records in found for record in records),
    )


def _interval(value: float, error: float, repeated: bool) -> str:
    return f"{'95 %' if repeated else 'two sampling errors'}: {value - error:.2f} to {value + error:.2f}"


def structures(claim: Claim, store: ReferenceStore) -> Finding:
    pairs = [(f"DiT ({name})", f"DiCo ({name})") for name in ("iso.", "iso.&skip", "U-shape")]
    return _order(
        TABLE_3,
        pairs,
        f"Table 3 has this order by FID in {_ordered(TABLE_3, pairs, 'fid', store)} of {len(pairs)}",
        store,
    )


def kernels(claim: Claim, store: ReferenceStore) -> Finding:
    """By FID; where that is measured at the claim's scale, by throughput on a GPU too."""
    names = ["DiCo-S", "DWC 5x5", "DWC 7x7"]
    pairs = list(zip(names, names[1:], strict=False))
    rows = [TABLE_4.row(name) for name in names]
    timed = {
        device: [
            store.reference.latest(timing_stage(row, TABLE_4.baseline, device)) for row in rows
        ]
        for device in ("cuda", "cpu")
    }
    device = "cuda" if all(timed["cuda"]) else "cpu"
    speeds = [
        (record.values["relative"], record.values["relative_spread"])
        for record in timed[device]
        if record
    ]
    words = ", ".join(f"{speed:.2f} ±{spread:.2f}" for speed, spread in speeds)
    orders = " and ".join(
        f"{_ordered(TABLE_4, pairs, column, store)} of {len(pairs)} by {word}"
        for column, word in (("fid", "FID"), ("throughput_img_s", "throughput"))
    )
    found = _order(
        TABLE_4,
        pairs,
        f"Table 4 has the order in {orders}; relative throughput on {'a GPU' if device == 'cuda' else 'the CPU'} here: {words or 'none'}",
        store,
    )
    if found.evidence != MEASURED:
        return found
    if device == "cpu":
        return replace(found, verdict=f"{found.verdict}, by FID; throughput not measured on a GPU")
    gaps = [
        (one[0] - two[0], 2 * math.hypot(one[1], two[1]))
        for one, two in zip(speeds, speeds[1:], strict=False)
    ]
    slower = direction([0 if abs(gap) <= error else 1 if gap > 0 else -1 for gap, error in gaps])
    verdict = (
        found.verdict
        if found.verdict.startswith(slower)
        else f"{found.verdict}, by FID; by throughput {slower}"
    )
    return replace(found, verdict=verdict, records=(*found.records, *filter(None, timed[device])))


def _order(table: Table, pairs: Pairs, paper: str, store: ReferenceStore) -> Finding:
    """Fréchet distance of the first row over the second's for every pair, which the claim says is above 1: at the claim's scale, else on digits."""
    for protocol, evidence in ((IMAGENET256, MEASURED), (DIGITS, REDUCED)):
        scores, spread, why = _of_rows(table, pairs, protocol, store)
        if why is None:
            break
        paper += f"; {why}" * bool(why)
    else:
        return Finding(NOT_YET, "", "open", paper)
    name = next(iter(SCORES[protocol.features]))
    labels = sorted(scores)
    mean = dict(
        zip(
            labels,
            means(name, [scores[label] for label in labels], len(pairs), spread),
            strict=True,
        )
    )
    parts, signs = [], []
    for worse, better in pairs:
        gap, width = (
            math.log(mean[worse].value / mean[better].value),
            math.hypot(mean[worse].width, mean[better].width),
        )
        parts.append((math.exp(gap), math.exp(gap - width), math.exp(gap + width)))
        signs.append(0 if abs(gap) <= width else 1 if gap > 0 else -1)
    basis = (
        f"{name} on {protocol.name}, "
        + ", ".join(f"{worse} over {better}" for worse, better in pairs)
        + f"; {paper}"
    )
    value, error = (
        ", ".join(f"{ratio:.2f}" for ratio, _, _ in parts) + f" (ratio{'s' * (len(parts) > 1)})",
        ", ".join(f"{low:.2f} to {high:.2f}" for _, low, high in parts),
    )
    level = "95 %" if spread else "two sampling errors"
    return Finding(
        evidence,
        value,
        direction(signs) + ", one seed" * (spread is None),
        basis,
        f"{level}: {error}",
        tuple(record for label in labels for record in scores[label]),
    )


def _of_rows(
    table: Table, pairs: Pairs, protocol: Protocol, store: ReferenceStore
) -> tuple[dict[str, list[Record]], tuple[float, int] | None, str | None]:
    """Scores of the pairs' rows, the spread over seeds pooled over the table, and why they cannot be judged, '' where nothing was run at the claim's scale; else None.

    On digits the spread must be known, at the claim's scale a single training says something.
    """
    found, other = rankable(table.rows, protocol, store)
    every = {row.label: records for row, records in zip(table.rows, found, strict=True)}
    spread = pooled(
        next(iter(SCORES[protocol.features])),
        [[record.values for record in records] for records in found],
    )
    scores = {label: every[label] for pair in pairs for label in pair}
    if refused := [
        f"{label} ({', '.join(other[label])})" for label in sorted(scores.keys() & other.keys())
    ]:
        return {}, None, f"not compared, scored by another protocol: {'; '.join(refused)}"
    missing = [label for label, records in scores.items() if not records]
    if protocol is DIGITS and (spread is None or missing):
        return {}, None, "no repeated digits records"
    if missing:
        return (
            {},
            None,
            f"not judged on {protocol.name}: no record of {', '.join(missing)}"
            if len(missing) < len(scores)
            else "",
        )
    return scores, spread, None


def _ordered(table: Table, pairs: Pairs, column: str, store: ReferenceStore) -> int:
    """Pairs whose second row has the lower published number."""
    rows, keys = (
        store.published(table.published, table.key),
        {row.label: row.published for row in table.rows},
    )
    return sum(float(rows[keys[a]][column]) > float(rows[keys[b]][column]) for a, b in pairs)


BY_KIND: dict[tuple[str, str], Callable[[Claim, ReferenceStore], Finding]] = {
    ("fid", "value"): fid_value,
    ("fid", "ratio"): fid_ratio,
}
BY_ID = {
    "cca-fid": cca,
    "structure-order": structures,
    "kernel-order": kernels,
    "scaling-order": scaling,
}
