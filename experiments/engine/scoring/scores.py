"""Inception scores of a set of images against a reference, each beside its error, and of two models on common seeds.

N is the number of scored images. A layer's statistics are accumulated in float64 in ten blocks that have the same mix of
rows, so that the distance of N images, its finite-N bias and its error come from one pass.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.engine.data.image_files import POOL
from experiments.engine.scoring import metrics
from experiments.engine.scoring.measure import KID_SIZE, NEIGHBOURS, Measured, blocks, blocks_sum
from experiments.engine.scoring.metrics import Moments, mind
from experiments.engine.scoring.neighbours import ADM_BLOCK, neighbour_shares, precision_recall_half
from experiments.engine.scoring.reference import Reference


def score(
    sample: Measured,
    reference: Reference,
    labels: ndarray | None = None,
    *,
    balanced: bool = False,
    half: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All scores of N samples by name, each with its error `_se` where it has one, `num` and `warnings`.

    labels (N,) are those the images were made for, in file order; balanced says that every class's count was fixed. half adds
    precision and recall in ADM's arithmetic. What the reference does not allow is left out.
    """
    n, within = len(sample.pool), _fixed(labels, balanced)
    values: dict[str, Any] = {"num": n}
    for name, layer in (("fid", "pool"), ("sfid", "spatial")):
        if layer in reference.moments:
            values |= _distance(name, getattr(sample, layer), reference.moments[layer], within)
    values["is"], values["is_se"] = metrics.inception_score(sample.probabilities)
    values["is_shuffled"] = metrics.inception_score(
        sample.probabilities[np.random.RandomState(2020).permutation(n)]
    )[0]
    if reference.rows is not None and min(n, len(reference.rows)) > NEIGHBOURS:
        values |= _neighbourhoods(sample.pool, reference.rows, half, device)
        size = min(KID_SIZE, n, len(reference.rows))
        values["kid"], values["kid_sd"] = metrics.kid(sample.pool, reference.rows, size=size)
        values["kid_subset"] = size
        values["mind"], values["mind_rows"] = (
            mind(sample.pool, reference.rows, device=device),
            min(n, len(reference.rows)),
        )
    warnings = [*reference.warnings, *_warnings(values, labels)]
    if sample.size and reference.size and sample.size != reference.size:
        warnings.append(
            f"the samples have {' x '.join(map(str, sample.size))} pixels and the reference's images {' x '.join(map(str, reference.size))}: resized twice, they compare with nothing"
        )
    return values | {"warnings": warnings}


def paired(
    a: Measured, b: Measured, reference: Reference, labels: ndarray | None, balanced: bool
) -> dict[str, Any]:
    """FID of a less that of b, with its error over redraws of the common seeds and as if the sets were independent.

    Rows i of both are made from the same seed for the same label; ValueError if their numbers differ.
    """
    if len(a.pool) != len(b.pool):
        raise ValueError(
            f"a paired comparison needs as many samples of each model, got {len(a.pool)} and {len(b.pool)}"
        )
    within = _fixed(labels, balanced)
    moments = [blocks_sum(side.pool) for side in (a, b)]
    fids = [metrics.frechet(side, reference.moments["pool"]) for side in moments]
    values: dict[str, Any] = {
        "num": len(a.pool),
        "fid_difference": fids[0] - fids[1],
        "fid_difference_se": math.nan,
        "fid_difference_se_unpaired": math.nan,
    }
    if len(a.pool) >= 4 * POOL:
        psi = [
            metrics.frechet_influence(side.pool, own, reference.moments["pool"])
            for side, own in zip((a, b), moments, strict=True)
        ]
        values["fid_difference_se"] = metrics.influence_se(psi[0] - psi[1], within)
        values["fid_difference_se_unpaired"] = float(
            np.hypot(*(metrics.influence_se(part, within) for part in psi))
        )
    resolved = abs(values["fid_difference"]) > 2 * values["fid_difference_se"]
    return values | {
        "fid_relative": 2 * (fids[0] - fids[1]) / (fids[0] + fids[1]),
        "verdict": "resolved" if resolved else "not resolved",
    }


def distances(sample: dict[str, Moments], reference: Reference) -> dict[str, float]:
    """FID and sFID between statistics: all that a file without images allows."""
    layers = {"fid": "pool", "sfid": "spatial"}
    return {
        name: metrics.frechet(sample[layer], reference.moments[layer])
        for name, layer in layers.items()
        if layer in sample and layer in reference.moments
    }


def _fixed(labels: ndarray | None, balanced: bool) -> ndarray | None:
    """Labels whose counts were fixed in advance, if there are enough of each to see their spread."""
    return (
        labels
        if balanced and labels is not None and len(labels) >= 2 * len(np.unique(labels))
        else None
    )


def _distance(
    name: str, features: ndarray, reference: Moments, labels: ndarray | None
) -> dict[str, float]:
    """The distance, its sampling error from N = 4 d on, and from 2 d on its value without the O(1/N) bias."""
    parts = blocks(features, labels)
    whole = reduce(add, parts)
    values = {
        name: metrics.frechet(whole, reference),
        f"{name}_se": metrics.frechet_se(features, whole, reference, labels),
    }
    corrected = (
        metrics.frechet_jackknife(parts, reference)
        if name == "fid" and len(features) >= 2 * whole.mean.size
        else (math.nan, math.nan)
    )
    return values | (
        {f"{name}_corrected": corrected[0], f"{name}_corrected_se": corrected[1]}
        if name == "fid"
        else {}
    )


def _neighbourhoods(
    pool: ndarray, rows: ndarray, half: bool, device: torch.device | str
) -> dict[str, float]:
    found = neighbour_shares(
        rows, pool, NEIGHBOURS, 2000 if torch.device(device).type == "cpu" else ADM_BLOCK, device
    )._asdict()
    if half:
        found |= zip(
            ("precision_half", "recall_half"),
            precision_recall_half(rows, pool, NEIGHBOURS, ADM_BLOCK, device),
            strict=True,
        )
    counts = {
        name: len(pool) if name.startswith("precision") else len(rows)
        for name in found
        if not name.startswith("density")
    }
    return (
        {"num_reference": len(rows)}
        | found
        | {f"{name}_se": metrics.proportion_se(found[name], n) for name, n in counts.items()}
    )


def _warnings(values: dict[str, Any], labels: ndarray | None) -> list[str]:
    n, found = values["num"], []
    if n < POOL:
        found.append(
            f"{n} samples are fewer than the {POOL} feature dimensions: FID and sFID are mostly finite-sample bias and compare with nothing"
        )
    if n < 4 * POOL:
        found.append(
            f"{n} samples are fewer than {4 * POOL}: no sampling error of FID"
            + (", no bias correction" if n < 2 * POOL else "")
        )
    if values.get("kid_subset", KID_SIZE) < KID_SIZE:
        found.append(f"KID is over subsets of {values['kid_subset']}, not {KID_SIZE}")
    if labels is not None and n > 1:
        _, counts = np.unique(labels, return_counts=True)
        expected, together = (
            float(np.square(counts / n).sum()),
            float((labels[1:] == labels[:-1]).mean()),
        )
        if together > (1 + expected) / 2:
            one = f"IS of {n} is one block, whose value keeps but whose error, over parts in file order, does not hold"
            several = f"IS over blocks of {metrics.IS_BLOCK} in file order is far too low"
            found.append(
                f"the samples are ordered by class ({together:.0%} follow one of their own class): {several if n > metrics.IS_BLOCK else one}; shuffle the file"
            )
    if (
        not any("ordered by class" in text for text in found)
        and values["is"] < 0.95 * values["is_shuffled"]
    ):
        found.append(
            f"IS is {values['is']:.2f} in file order and {values['is_shuffled']:.2f} shuffled: the samples are ordered; shuffle the file"
        )
    return found
