"""Scores of generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.engine import metrics
from experiments.engine.data import load
from experiments.engine.features import digits_classifier, extract
from experiments.engine.generate import images
from experiments.engine.neighbours import precision_recall
from experiments.engine.sources import require_features
from experiments.engine.spec import Evaluate
from experiments.engine.train import Resources, load_ema


def run(spec: Evaluate, folder: Path, cache: Path, resources: Resources) -> dict[str, Any]:
    """Sample with the finished run's EMA network and score on the digits classifier's features.

    Values are floats with their standard errors beside them: influence function for fd_digits, delete-a-block
    jackknife for is_digits, binomial for the shares.
    """
    require_features(spec)
    device = torch.device(resources.device)
    reference = load(spec.train.data)
    classifier, identity = digits_classifier(reference, cache)
    real, _ = extract(classifier, reference.take(torch.arange(len(reference)))[0])
    real_moments, moments = metrics.Moments(real.shape[1]), metrics.Moments(real.shape[1])
    real_moments.update(real)
    features, probabilities, labels = [], [], []
    for x, y in images(spec, load_ema(spec.train, folder, device), device, resources.sample_batch):
        part, part_probabilities = extract(classifier, x)
        moments.update(part)
        features.append(part)
        probabilities.append(part_probabilities)
        labels.append(y.numpy())
    fake, y, p = np.concatenate(features), np.concatenate(labels), np.concatenate(probabilities)
    precision, recall = precision_recall(real, fake)
    agreement = float((p.argmax(1) == y).mean())
    score, score_se = metrics.inception_score(p)
    return {
        "num": spec.num,
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
