"""Scores of generated images."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.engine import metrics
from experiments.engine.data import load
from experiments.engine.distributed import ALONE, Group
from experiments.engine.features import digits_classifier, extract
from experiments.engine.generate import Counted, images
from experiments.engine.heartbeat import Heartbeat
from experiments.engine.sharding import results
from experiments.engine.sources import require_features
from experiments.engine.spec import Evaluate, spec_id
from experiments.engine.train import Resources, digest, load_ema


def run(spec: Evaluate, folder: Path, cache: Path, resources: Resources, group: Group = ALONE, beat: Heartbeat | None = None) -> dict[str, Any]:
    """Sample with the finished run's EMA network and score on the digits classifier's features.

    Values are floats with their standard errors beside them: influence function for fd_digits, delete-a-block
    jackknife for is_digits, binomial for the shares. Every rank of the group samples its share of the batches, cut as one
    process would cut them, so that no number depends on the group; the first rank scores, the others return {}.
    """
    require_features(spec)
    device, size = torch.device(resources.device), resources.sample_batch
    reference = load(spec.train.data)
    classifier, identity = digits_classifier(reference, cache)
    network = load_ema(spec.train, folder, device)

    def scored(piece: int) -> dict[str, np.ndarray]:
        counted = Counted(network)
        ((x, y),) = images(spec, counted, device, size, range(piece * size, min((piece + 1) * size, spec.num)))
        features, probabilities = extract(classifier, x)
        return {"features": features, "probabilities": probabilities, "labels": y.numpy(), "evaluated": np.array(counted.evaluated)}

    parts = folder / f"samples-{spec_id(spec)}-{size}-{digest(network)}"
    found = list(results(group, parts, math.ceil(spec.num / size), scored, beat))
    if not group.first:
        return {}
    moments = metrics.Moments(found[0]["features"].shape[1])
    for part in found:
        moments.update(part["features"])
    fake, y, p = (np.concatenate([part[name] for part in found]) for name in ("features", "labels", "probabilities"))
    real, _ = extract(classifier, reference.take(torch.arange(len(reference)))[0])
    real_moments = metrics.Moments(real.shape[1])
    real_moments.update(real)
    precision, recall = metrics.precision_recall(real, fake)
    agreement = float((p.argmax(1) == y).mean())
    score, score_se = metrics.inception_score(p)
    values = {
        "num": spec.num,
        "nfe": sum(int(part["evaluated"]) for part in found) / spec.num,
        "fd_digits": metrics.frechet(moments, real_moments),
        "fd_digits_se": metrics.frechet_se(fake, moments, real_moments, y if spec.labels == "balanced" else None),
        "is_digits": score,
        "is_digits_se": score_se,
        "precision_digits": precision,
        "precision_digits_se": metrics.proportion_se(precision, len(fake)),
        "recall_digits": recall,
        "recall_digits_se": metrics.proportion_se(recall, len(real)),
        "agreement": agreement,
        "agreement_se": metrics.proportion_se(agreement, len(fake)),
        **identity,
    }
    shutil.rmtree(parts, ignore_errors=True)
    return values
