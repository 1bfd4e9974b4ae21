"""Verdicts on claims of the second version of the paper. No torch.

Most of them are numbers only: nobody described the network, or nothing of its scale can be run
here. That pure convolution keeps up with cross-attention is judged on captioned digits.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.claims.finding import (
    Evidence,
    Finding,
    check_consistency,
    open_finding,
    published_number,
)
from analysis.query import ReferenceStore, rankable
from experiments.declared.protocols import DIGITS_TEXT
from experiments.engine.records.score_names import CAPTION_SCORES
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.statistics import mean_score, noise_bound, pool_spread
from experiments.engine.reporting.verdict import Judgement, Verdict
from experiments.text_to_image import TABLE_V2_3

# How many points of the share of right canvases a network may lack and still keep up, and by what
# factor its FID may be higher.
MARGIN = 0.05
FID_MARGIN = 1.05
# Pairs of digits that no training has seen, with every named cell right.
RIGHT = CAPTION_SCORES["all", "held_out"].key

SCALE = "numbers only: nothing of this scale is trained or scored here"


def judge_number(claim: Claim, store: ReferenceStore) -> Finding:
    """A printed FID that nothing here can be set against."""
    fid = published_number(claim["subject"], "fid", store)
    if fid is None:
        return open_finding("the paper's tables hold no such row")
    return Finding(
        Evidence.PUBLISHED,
        f"{fid:.2f}",
        check_consistency(fid, claim["value"]),
        f"the table repeats it; {SCALE}",
        "one run, none given",
    )


def judge_lead(file: str, claim: Claim, store: ReferenceStore) -> Finding:
    """Whether a network of a published table has the lowest FID and the highest throughput.

    Args:
        file: of the published table.
        claim: its baseline lists the other networks.
        store: the published tables.
    """
    published = store.published(file, ("model",))
    ours, others = published[claim["subject"]], claim["baseline"].split("; ")
    lower = sum(float(ours["fid"]) < float(published[other]["fid"]) for other in others)
    faster = sum(
        float(ours["throughput_img_s"]) > float(published[other]["throughput_img_s"])
        for other in others
    )
    leads = lower == faster == len(others)
    ratios = ", ".join(
        f"{float(ours['throughput_img_s']) / float(published[other]['throughput_img_s']):.2f}"
        for other in others
    )
    return Finding(
        Evidence.PUBLISHED,
        f"FID {lower} of {len(others)}; throughput {faster} of {len(others)}",
        Judgement(Verdict.CONSISTENT if leads else Verdict.INCONSISTENT),
        f"its throughput over that of {claim['baseline']}: {ratios}; {SCALE}",
        "one run each, none given",
    )


def judge_convolution(claim: Claim, store: ReferenceStore) -> Finding:
    """Whether depthwise convolution by text does as well as cross-attention.

    By the share of right canvases on pairs of digits that no training has seen. Convolution keeps
    up if the whole interval of the difference lies above minus MARGIN.
    """
    labels = (claim["subject"], claim["baseline"])
    printed = {row["model"]: float(row["fid"]) for row in store.rows("tablev2-3.csv")}
    ratio = printed[labels[0]] / printed[labels[1]]
    paper = f"the paper's FIDs are {printed[labels[0]]:.2f} and {printed[labels[1]]:.2f}"

    rows = [TABLE_V2_3.row(label) for label in labels]
    (ours, other), refused = rankable(rows, DIGITS_TEXT, store)
    if ours and other and not refused:
        return _judge_difference(ours, other, paper)
    reason = "scored by other protocols" if refused else "not both trained"
    return Finding(
        Evidence.PUBLISHED,
        f"{ratio:.2f} (ratio of FIDs)",
        Judgement(Verdict.CONSISTENT if ratio <= FID_MARGIN else Verdict.INCONSISTENT),
        f"{paper}, within {100 * (FID_MARGIN - 1):.0f} % counts as keeping up; on "
        f"{DIGITS_TEXT.name} {reason}",
        "one run each, none given",
    )


def _judge_difference(ours: Sequence[Record], other: Sequence[Record], paper: str) -> Finding:
    """The difference of two networks' shares of right canvases, with its interval over seeds."""
    values = [[record.values for record in records] for records in (ours, other)]
    means = [mean_score(RIGHT, of_row) for of_row in values]
    difference = means[0] - means[1]
    records = (*ours, *other)
    basis = (
        f"pairs held out on {DIGITS_TEXT.name}, share of canvases with every named cell right: "
        f"{means[0]:.3f} and {means[1]:.3f}, {len(ours)} and {len(other)} seeds; keeps up within "
        f"{MARGIN:g}; {paper}"
    )
    spread = pool_spread(RIGHT, values)
    if spread is None:
        judgement = Judgement(Verdict.NOT_RESOLVED, ("no network has two seeds",))
        return Finding(
            Evidence.REDUCED, f"{difference:+.3f}", judgement, basis, "unknown", False, records
        )

    error = noise_bound(spread, len(ours), len(other), 1)
    low, high = difference - error, difference + error
    if low > -MARGIN:
        verdict = Verdict.REPRODUCED
    else:
        verdict = Verdict.AGAINST if high < -MARGIN else Verdict.NOT_RESOLVED
    interval = f"95 %: {low:+.3f} to {high:+.3f}"
    return Finding(
        Evidence.REDUCED,
        f"{difference:+.3f}",
        Judgement(verdict),
        basis,
        interval,
        True,
        records,
    )
