"""Monge Inception distance (arXiv:2605.06797): how far the sorted projections of two sets lie apart, over many random directions."""

from __future__ import annotations

import numpy as np
import torch
from numpy import ndarray

from experiments.engine.metrics import rows

TOGETHER = 100  # directions whose projections are held at a time


def mind(
    samples: ndarray,
    reference: ndarray,
    directions: int = 10_000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> float:
    """3 d times the mean over unit directions u of the squared 2-Wasserstein distance of samples (n, d).u and reference (m, d).u.

    The larger set is first thinned to as many rows as the other; that and the directions are drawn as torch-fidelity draws
    them. Two sets of one distribution are about d / n apart, so values compare only at the same number of rows.
    """
    x, y = rows("samples", samples), rows("reference", reference)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}")
    n, dim = min(len(x), len(y)), x.shape[1]
    if n < 1 or directions < 1:
        raise ValueError(
            f"need rows and directions, got {len(x)} and {len(y)} rows and {directions} directions"
        )
    draw = torch.Generator().manual_seed(seed)
    x, y = (
        side[torch.randperm(len(side), generator=draw)[:n].numpy()] if len(side) > n else side
        for side in (x, y)
    )
    along = torch.randn(directions, dim, generator=draw)
    along /= along.norm(dim=1, keepdim=True)
    a, b = (torch.from_numpy(side).to(device, torch.float32) for side in (x, y))
    gaps = [
        ((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean(0)
        for u in along.to(device).T.split(TOGETHER, 1)
    ]
    return float(3 * dim * np.mean(torch.cat(gaps).double().cpu().numpy()))
