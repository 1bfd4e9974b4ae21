"""The claim that larger DiCo models score and train better at every step, by Table 7, the authors' logs and our own trainings. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.claims.finding import MEASURED, PUBLISHED, Finding, direction, means
from analysis.query import ReferenceStore, scores_of
from analysis.tables.conditions import progress_curve, progress_row, stopped
from analysis.tables.pages import once
from experiments.engine.records.comparison import clashes
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.statistics import pooled

MODELS = ("DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL")
Pairs = Sequence[tuple[str, str]]


def scaling(claim: Claim, store: ReferenceStore) -> Finding:
    """Orders in Table 7 at every step, and in the authors' logs window by window; ours in their place where neighbouring sizes were trained."""
    fid = {
        (row["model"], row["train_steps"]): float(row["fid"]) for row in store.rows("table7.csv")
    }
    steps = sorted({step for _, step in fid}, key=int)
    pairs = list(zip(MODELS, MODELS[1:], strict=False))
    fids = [fid[a, step] > fid[b, step] for a, b in pairs for step in steps]
    loss = {
        (row["model"], row["last_step"]): (
            float(row["loss"]),
            float(row["loss_sd"]) / math.sqrt(int(row["lines"])),
        )
        for row in store.rows("dico_logs.csv")
        if row["loss_sd"]
    }
    windows = [
        step
        for model, step in loss
        if model == MODELS[0] and all((other, step) in loss for other in MODELS)
    ]
    clear, counter, lower = 0, 0, []
    for a, b in pairs:
        for step in windows:
            (one, e1), (two, e2) = loss[a, step], loss[b, step]
            lower.append(one > two)
            clear, counter = (
                clear + (one - two > 2 * math.hypot(e1, e2)),
                counter + (two - one > 2 * math.hypot(e1, e2)),
            )
    value = f"FID {sum(fids)} of {len(fids)}; loss {sum(lower)} of {len(lower)}"
    verdict = (
        "consistent"
        if all(fids) and all(lower)
        else "consistent in FID, in loss not in every window"
        if all(fids)
        else "inconsistent"
    )
    basis = f"neighbouring sizes in Table 7 at {len(steps)} steps, and in the authors' logs over {len(windows)} windows of 1000 steps: {clear} clear by two standard errors, {counter} clear the other way"
    theirs = Finding(PUBLISHED, value, verdict, basis, "loss: from the lines of a window")
    return _own_scaling(pairs, [int(step) for step in steps], theirs, store) or theirs


def _own_scaling(
    pairs: Pairs, steps: Sequence[int], theirs: Finding, store: ReferenceStore
) -> Finding | None:
    """None where no two neighbouring sizes have a score of ours after the same number of steps."""
    scores = {
        (model, step): scores_of(progress_row(model), stopped(step), store)
        for model in MODELS
        for step in steps
    }
    both = [
        (scores[a, step], scores[b, step])
        for a, b in pairs
        for step in steps
        if scores[a, step] and scores[b, step]
    ]
    judged = [(one, two) for one, two in both if not clashes([*one, *two], one)]
    if not judged:
        return None
    spread, signs = (
        pooled(
            "fid", [[record.values for record in records] for pair in judged for records in pair]
        ),
        [],
    )
    for pair in judged:
        small, large = means("fid", pair, len(judged), spread)
        gap = math.log(small.value / large.value)
        signs.append(
            0 if abs(gap) <= math.hypot(small.width, large.width) else 1 if gap > 0 else -1
        )
    lower, trained = _own_losses(pairs, steps, store)
    total = len(pairs) * len(steps)
    verdict = direction(signs)
    if verdict == "reproduced" and (len(judged) < total or not lower or not all(lower)):
        verdict = f"same direction, {len(judged)} of {total} comparisons by FID, {sum(lower)} of {len(lower)} windows by loss"
    records = once([*(record for pair in judged for one in pair for record in one), *trained])
    refused = f"; {len(both) - len(judged)} comparisons refused, scored by another protocol" * (
        len(judged) < len(both)
    )
    basis = f"our trainings on imagenet256, neighbouring sizes after the same steps{refused}; published: {theirs.value} ({theirs.verdict}), {theirs.basis}"
    value = f"FID {sum(sign > 0 for sign in signs)} of {len(signs)}, resolved; loss {sum(lower)} of {len(lower)}"
    error = "95 % over seeds" if spread else "FID: two sampling errors, loss: none"
    return Finding(
        MEASURED, value, verdict + ", one seed" * (spread is None), basis, error, records
    )


def _own_losses(
    pairs: Pairs, steps: Sequence[int], store: ReferenceStore
) -> tuple[list[bool], list[Record]]:
    """Whether the larger of two neighbouring sizes has the lower mean loss, for every window of their longest recorded trainings that both have."""
    curves = {model: record for model in MODELS if (record := progress_curve(model, steps, store))}
    lower = []
    for a, b in pairs:
        if a in curves and b in curves:
            one, two = curves[a].values["curve"], curves[b].values["curve"]
            lower += (
                [x > y for x, y in zip(one["losses"], two["losses"], strict=False)]
                if one["every"] == two["every"]
                else []
            )
    return lower, list(curves.values())
