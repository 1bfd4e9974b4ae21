"""Inception scores of a set of images against a reference, and of two models on common seeds.

Each score stands beside its error. N is the number of scored images. A layer's statistics are
accumulated in float64 in ten blocks that have the same mix of rows, so that the distance of N
images, its finite-N bias and its error come from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.engine.data.image_files import POOL
from experiments.engine.records.score_names import (
    COVERAGE,
    COVERAGE_DINOV2,
    DINOV2_SCORES,
    FD_DINOV2,
    INCEPTION_SCORES,
    PRECISION,
    PRECISION_DINOV2,
    PRECISION_HALF,
    RECALL,
    RECALL_DINOV2,
    RECALL_HALF,
)
from experiments.engine.reporting.verdict import Verdict
from experiments.engine.scoring.files.repeats import count_repeats, repeat_warnings, repeats
from experiments.engine.scoring.frechet import (
    frechet,
    frechet_influence,
    frechet_jackknife,
    frechet_se,
    influence_se,
)
from experiments.engine.scoring.measure import Measured
from experiments.engine.scoring.metrics import IS_BLOCK, inception_score, kid, mind, proportion_se
from experiments.engine.scoring.moments import Moments, moments_of, split_into_blocks
from experiments.engine.scoring.neighbours import (
    ADM_BLOCK,
    BLOCK,
    NEIGHBOURS,
    neighbour_shares,
    precision_recall_half,
)
from experiments.engine.scoring.reference import Reference

KID_SIZE = 1000  # rows of a subset
SHUFFLE_SEED = 2020  # of the shuffled inception score, as in torch-fidelity
DISTANCES = {
    "fid": "pool",
    "sfid": "spatial",
    FD_DINOV2.key: "dinov2",
}  # the layer of each distance


def score(
    sample: Measured,
    reference: Reference,
    labels: ndarray | None = None,
    *,
    balanced: bool = False,
    half: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the scores of N samples by name, each with its error `_se` where it has one.

    `num` and `warnings` stand beside them. What the reference does not allow is left out.

    Args:
        sample: features of the samples.
        reference: what they are scored against.
        labels: the classes (N,) that the images were made for, in file order.
        balanced: whether the count of each class was fixed.
        half: whether to add precision and recall in ADM's arithmetic.
        device: where neighbours and projections are computed.
    """
    n = len(sample.pool)
    fixed = _fixed_labels(labels, balanced)

    values: dict[str, Any] = {"num": n}
    if "pool" in reference.moments:
        blocks = split_into_blocks(sample.pool, fixed)
        values |= _distance("fid", sample.pool, blocks, reference.moments["pool"], fixed)
        values |= _corrected_fid(blocks, reference.moments["pool"])
    if "spatial" in reference.moments:
        blocks = split_into_blocks(sample.spatial, fixed)
        values |= _distance("sfid", sample.spatial, blocks, reference.moments["spatial"], fixed)

    order = np.random.RandomState(SHUFFLE_SEED).permutation(n)
    values["is"], values["is_se"] = inception_score(sample.probabilities)
    values["is_shuffled"], _ = inception_score(sample.probabilities[order])

    if reference.rows is not None and min(n, len(reference.rows)) > NEIGHBOURS:
        values |= _scores_by_rows(sample.pool, reference.rows, half, device)
    if sample.dinov2 is not None and "dinov2" in reference.moments:
        values |= _dinov2_scores(sample.dinov2, reference, fixed, device)

    warnings = [*reference.warnings, *_warnings(values, labels)]
    if sample.prints is not None:
        values |= count_repeats(sample.prints, reference.prints)
        warnings += repeat_warnings(values, n)
        if repeats(values):
            values |= dict.fromkeys(_errors(values), math.nan)
    if sample.size and reference.size and sample.size != reference.size:
        warnings.append(
            f"the samples have {_text_of(sample.size)} pixels and the reference's images "
            f"{_text_of(reference.size)}: resized twice, they compare with nothing"
        )
    return values | {"warnings": warnings}


def _errors(values: dict[str, Any]) -> list[str]:
    """Return the keys of the standard errors among some values."""
    scores = (*INCEPTION_SCORES, *DINOV2_SCORES)
    return [score.error for score in scores if score.error in values]


@dataclass(frozen=True)
class PairedDifference:
    """The FID of one set of samples less that of another from common seeds."""

    # Samples of each set.
    num: int
    # In FID.
    value: float
    # Standard error over redraws of the common seeds; nan with too few samples.
    error: float
    # The error as if the sets were independent; nan with too few samples.
    error_unpaired: float
    # The difference over the mean of both FIDs.
    relative: float
    # RESOLVED beyond two standard errors, else NOT_RESOLVED.
    verdict: Verdict


def paired(
    a: Measured, b: Measured, reference: Reference, labels: ndarray | None, balanced: bool
) -> PairedDifference:
    """Return the FID of a less that of b, with its error.

    Rows i of both are made from the same seed for the same label.

    Raises:
        ValueError: if their numbers differ.
    """
    if len(a.pool) != len(b.pool):
        raise ValueError(
            "a paired comparison needs as many samples of each model, "
            f"got {len(a.pool)} and {len(b.pool)}"
        )
    real = reference.moments["pool"]
    moments = [moments_of(features) for features in (a.pool, b.pool)]
    fids = [frechet(sample, real) for sample in moments]
    difference = fids[0] - fids[1]

    # Influences give the errors, if there are enough samples for them and none repeats.
    paired_se = math.nan
    unpaired_se = math.nan
    repeated = any(x.prints and repeats(count_repeats(x.prints, None)) for x in (a, b))
    if len(a.pool) >= 4 * POOL and not repeated:
        fixed = _fixed_labels(labels, balanced)
        psi_a = frechet_influence(a.pool, moments[0], real)
        psi_b = frechet_influence(b.pool, moments[1], real)
        paired_se = influence_se(psi_a - psi_b, fixed)
        unpaired_se = float(np.hypot(influence_se(psi_a, fixed), influence_se(psi_b, fixed)))

    resolved = abs(difference) > 2 * paired_se
    return PairedDifference(
        num=len(a.pool),
        value=difference,
        error=paired_se,
        error_unpaired=unpaired_se,
        relative=2 * difference / (fids[0] + fids[1]),
        verdict=Verdict.RESOLVED if resolved else Verdict.NOT_RESOLVED,
    )


def distances(sample: dict[str, Moments], reference: Reference) -> dict[str, float]:
    """Return FID and sFID between statistics: all that a file without images allows."""
    return {
        name: frechet(sample[layer], reference.moments[layer])
        for name, layer in DISTANCES.items()
        if layer in sample and layer in reference.moments
    }


def _fixed_labels(labels: ndarray | None, balanced: bool) -> ndarray | None:
    """Return the labels if their counts were fixed and each class is large enough for a spread."""
    if labels is None or not balanced:
        return None
    return labels if len(labels) >= 2 * len(np.unique(labels)) else None


def _distance(
    name: str,
    features: ndarray,
    blocks: Sequence[Moments],
    reference: Moments,
    labels: ndarray | None,
) -> dict[str, float]:
    """Return a Fréchet distance, with its sampling error from N = 4 d on."""
    whole = reduce(add, blocks)
    return {
        name: frechet(whole, reference),
        f"{name}_se": frechet_se(features, whole, reference, labels),
    }


def _corrected_fid(blocks: Sequence[Moments], reference: Moments) -> dict[str, float]:
    """Return the FID without its O(1/N) bias, and its error; nan below N = 2 d."""
    value = math.nan
    error = math.nan
    if sum(block.n for block in blocks) >= 2 * reference.mean.size:
        value, error = frechet_jackknife(blocks, reference)
    return {"fid_corrected": value, "fid_corrected_se": error}


def _scores_by_rows(
    pool: ndarray, rows: ndarray, half: bool, device: torch.device | str
) -> dict[str, Any]:
    """Return the scores that compare single images: neighbours, KID and MIND."""
    values = _neighbour_scores(pool, rows, half, device)

    size = min(KID_SIZE, len(pool), len(rows))
    values["kid"], values["kid_sd"] = kid(samples=pool, reference=rows, size=size)
    values["kid_subset"] = size

    values["mind"] = mind(samples=pool, reference=rows, device=device)
    values["mind_rows"] = min(len(pool), len(rows))
    return values


def _dinov2_scores(
    tokens: ndarray, reference: Reference, fixed: ndarray | None, device: torch.device | str
) -> dict[str, Any]:
    """Return the scores on DINOv2's class tokens, each with its error where it has one.

    Args:
        tokens: of the samples, (N, d).
        reference: with the layer's statistics, and rows where it has images.
        fixed: labels (N,) whose counts were fixed.
        device: where neighbours are searched.
    """
    blocks = split_into_blocks(tokens, fixed)
    values: dict[str, Any] = _distance(
        FD_DINOV2.key, tokens, blocks, reference.moments["dinov2"], fixed
    )
    rows = reference.dinov2
    if rows is None or min(len(tokens), len(rows)) <= NEIGHBOURS:
        return values

    block = BLOCK if torch.device(device).type == "cpu" else ADM_BLOCK
    shares = neighbour_shares(samples=tokens, reference=rows, block=block, device=device)
    values |= {f"{name}_dinov2": share for name, share in asdict(shares).items()}
    for score, n in (
        (PRECISION_DINOV2, len(tokens)),
        (RECALL_DINOV2, len(rows)),
        (COVERAGE_DINOV2, len(rows)),
    ):
        values[score.error] = proportion_se(values[score.key], n)
    return values


def _neighbour_scores(
    pool: ndarray, rows: ndarray, half: bool, device: torch.device | str
) -> dict[str, Any]:
    """Return precision, recall, density and coverage with their errors."""
    block = BLOCK if torch.device(device).type == "cpu" else ADM_BLOCK
    shares = neighbour_shares(samples=pool, reference=rows, block=block, device=device)
    values = asdict(shares)
    if half:
        values["precision_half"], values["recall_half"] = precision_recall_half(
            samples=pool, reference=rows, device=device
        )

    # A share's error is binomial: precision is a share of samples, the others of reference rows.
    sizes = {
        PRECISION: len(pool),
        RECALL: len(rows),
        COVERAGE: len(rows),
        PRECISION_HALF: len(pool),
        RECALL_HALF: len(rows),
    }
    for share, n in sizes.items():
        if share.key in values:
            values[share.error] = proportion_se(values[share.key], n)
    return {"num_reference": len(rows)} | values


def _text_of(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


def _warnings(values: dict[str, Any], labels: ndarray | None) -> list[str]:
    """Return what limits the scores: too few samples, or an order that lowers the IS."""
    n = values["num"]
    warnings = []
    if n < POOL:
        warnings.append(
            f"{n} samples are fewer than the {POOL} feature dimensions: "
            "FID and sFID are mostly finite-sample bias and compare with nothing"
        )
    if n < 4 * POOL:
        no_correction = ", no bias correction" if n < 2 * POOL else ""
        warnings.append(
            f"{n} samples are fewer than {4 * POOL}: no sampling error of FID{no_correction}"
        )
    if values.get("kid_subset", KID_SIZE) < KID_SIZE:
        warnings.append(f"KID is over subsets of {values['kid_subset']}, not {KID_SIZE}")

    # Labels tell an order by class; without them, the shuffled score does.
    share = _share_after_own_class(labels)
    if share is not None:
        warnings.append(
            f"the samples are ordered by class ({share:.0%} follow one of their own class): "
            f"{_effect_of_order(n)}; shuffle the file"
        )
    elif values["is"] < 0.95 * values["is_shuffled"]:
        warnings.append(
            f"IS is {values['is']:.2f} in file order and {values['is_shuffled']:.2f} shuffled: "
            "the samples are ordered; shuffle the file"
        )
    return warnings


def _share_after_own_class(labels: ndarray | None) -> float | None:
    """Return the share of samples that follow one of their own class, if it is far too high."""
    if labels is None or len(labels) < 2:
        return None
    _, counts = np.unique(labels, return_counts=True)
    expected = float(np.square(counts / len(labels)).sum())
    share = float((labels[1:] == labels[:-1]).mean())
    return share if share > (1 + expected) / 2 else None


def _effect_of_order(n: int) -> str:
    """Say what an order by class does to the inception score of n samples."""
    if n > IS_BLOCK:
        return f"IS over blocks of {IS_BLOCK} in file order is far too low"
    return (
        f"IS of {n} is one block, whose value keeps but whose error, over parts in file order, "
        "does not hold"
    )
