"""The claim that larger DiCo models score and train better at every step. No torch.

By our own trainings if neighbouring sizes were trained, and otherwise by the paper's Table 7 and
the authors' logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.claims.finding import Evidence, Finding, judge_direction, means, sign_of
from analysis.query import ReferenceStore, scores_of
from analysis.tables.pages import once
from analysis.tables.progress import progress_curve, progress_row, stopped
from experiments.engine.records.comparison import clashes
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.statistics import pool_spread
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict

MODELS = ("DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL")

# Neighbouring sizes, the smaller one first.
PAIRS = tuple(zip(MODELS, MODELS[1:], strict=False))


def judge_scaling(claim: Claim, store: ReferenceStore) -> Finding:
    """The order of neighbouring sizes by FID and by loss."""
    steps = sorted({int(row["train_steps"]) for row in store.rows("table7.csv")})
    theirs = _judge_published(steps, store)
    return _judge_own(steps, theirs, store) or theirs


def _judge_published(steps: Sequence[int], store: ReferenceStore) -> Finding:
    """The order in Table 7 at every step, and in the authors' logs window by window."""
    fid = {
        (row["model"], int(row["train_steps"])): float(row["fid"])
        for row in store.rows("table7.csv")
    }
    fid_orders = [fid[small, step] > fid[large, step] for small, large in PAIRS for step in steps]
    losses = _published_losses(store)
    loss_orders = losses.orders

    # both must hold everywhere
    if all(fid_orders) and all(loss_orders):
        judgement = Judgement(Verdict.CONSISTENT)
    elif all(fid_orders):
        judgement = Judgement(Verdict.CONSISTENT, ("in FID", "in loss not in every window"))
    else:
        judgement = Judgement(Verdict.INCONSISTENT)
    by_fid = f"FID {sum(fid_orders)} of {len(fid_orders)}"
    by_loss = f"loss {sum(loss_orders)} of {len(loss_orders)}"
    return Finding(
        Evidence.PUBLISHED,
        f"{by_fid}; {by_loss}",
        judgement,
        f"neighbouring sizes in Table 7 at {len(steps)} steps, and in the authors' logs over "
        f"{losses.windows} windows of 1000 steps: {losses.clear} clear by two standard errors, "
        f"{losses.counter} clear the other way",
        "loss: from the lines of a window",
    )


@dataclass(frozen=True)
class LossOrders:
    """The order of neighbouring sizes by loss in the authors' logs."""

    # whether the larger size has the lower loss, for every pair and window
    orders: list[bool]
    # windows of steps that all sizes have
    windows: int
    # orders that are clear by two standard errors
    clear: int
    # orders that are as clear the other way
    counter: int


def _published_losses(store: ReferenceStore) -> LossOrders:
    # mean loss and its standard error, by model and the last step of a window
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

    orders, signs = [], []
    for small, large in PAIRS:
        for step in windows:
            (small_loss, small_error), (large_loss, large_error) = (
                loss[small, step],
                loss[large, step],
            )
            orders.append(small_loss > large_loss)
            error = 2 * math.hypot(small_error, large_error)
            signs.append(sign_of(small_loss - large_loss, error))
    return LossOrders(orders, len(windows), signs.count(1), signs.count(-1))


def _judge_own(steps: Sequence[int], theirs: Finding, store: ReferenceStore) -> Finding | None:
    """None if no two neighbouring sizes have a score of ours after the same number of steps."""
    recorded = _recorded_pairs(steps, store)
    judged = [pair for pair in recorded if not clashes([*pair[0], *pair[1]], pair[0])]
    if not judged:
        return None

    # whether the larger size has the lower FID, for every pair with both scores
    groups = [[record.values for record in records] for pair in judged for records in pair]
    spread = pool_spread("fid", groups)
    signs = []
    for pair in judged:
        small, large = means("fid", pair, len(judged), spread)
        gap = math.log(small.value / large.value)
        signs.append(sign_of(gap, math.hypot(small.width, large.width)))
    lower, trained = _own_losses(steps, store)

    # reproduced only if every pair was judged, and every window too
    judgement = judge_direction(signs)
    total = len(PAIRS) * len(steps)
    is_complete = len(judged) == total and bool(lower) and all(lower)
    if judgement.verdict is Verdict.REPRODUCED and not is_complete:
        judgement = Judgement(
            Verdict.SAME_DIRECTION,
            (
                f"{len(judged)} of {total} comparisons by FID",
                f"{sum(lower)} of {len(lower)} windows by loss",
            ),
        )
    if spread is None:
        judgement = judgement.qualified(Qualifier.ONE_SEED)

    refused = ""
    if len(judged) < len(recorded):
        refused = f"; {len(recorded) - len(judged)} comparisons refused, scored by another protocol"
    scored = [record for pair in judged for records in pair for record in records]
    return Finding(
        Evidence.MEASURED,
        f"FID {signs.count(1)} of {len(signs)}, resolved; loss {sum(lower)} of {len(lower)}",
        judgement,
        f"our trainings on imagenet256, neighbouring sizes after the same steps{refused}; "
        f"published: {theirs.value} ({theirs.judgement}), {theirs.basis}",
        "95 % over seeds" if spread else "FID: two sampling errors, loss: none",
        spread is not None,
        once([*scored, *trained]),
    )


def _recorded_pairs(
    steps: Sequence[int], store: ReferenceStore
) -> list[tuple[list[Record], list[Record]]]:
    """Our scores of neighbouring sizes after the same number of steps."""
    scores = {
        (model, step): scores_of(progress_row(model), stopped(step), store)
        for model in MODELS
        for step in steps
    }
    return [
        (scores[small, step], scores[large, step])
        for small, large in PAIRS
        for step in steps
        if scores[small, step] and scores[large, step]
    ]


def _own_losses(steps: Sequence[int], store: ReferenceStore) -> tuple[list[bool], list[Record]]:
    """Whether the larger size has the lower mean loss, window by window, and the trainings.

    The windows are those that the longest recorded trainings of both sizes have.
    """
    curves: dict[str, Record] = {}
    for model in MODELS:
        record = progress_curve(model, steps, store)
        if record:
            curves[model] = record

    lower: list[bool] = []
    for small, large in PAIRS:
        if small not in curves or large not in curves:
            continue
        theirs, ours = curves[small].values["curve"], curves[large].values["curve"]
        if theirs["every"] == ours["every"]:
            windows = zip(theirs["losses"], ours["losses"], strict=False)
            lower += [small_loss > large_loss for small_loss, large_loss in windows]
    return lower, list(curves.values())
