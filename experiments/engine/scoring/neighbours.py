"""Precision and recall (Kynkäänniemi et al. 2019, eq. 1-2), density and coverage (Naeem et al. 2020, eq. 5-6), in blocks, on any torch device.

Shapes: n samples, m reference points, d feature width.  A ball is closed and reaches its centre's k-th nearest other row
of the same set; a duplicate row counts as another row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from experiments.engine.numerics.precision import precision
from experiments.engine.scoring.metrics import rows

ADM_BLOCK = 10_000


class Shares(NamedTuple):
    """Of samples inside any reference ball; of reference points inside any sample ball; the mean number of reference balls that hold
    a sample, over k, with its error; of reference points whose own ball holds any sample."""

    precision: float
    recall: float
    density: float
    density_se: float
    coverage: float


def precision_recall(
    reference: ndarray,
    samples: ndarray,
    k: int = 3,
    block: int = 2000,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """The first two of `neighbour_shares`."""
    return neighbour_shares(reference, samples, k, block, device)[:2]


def neighbour_shares(
    reference: ndarray,
    samples: ndarray,
    k: int = 3,
    block: int = 2000,
    device: torch.device | str = "cpu",
) -> Shares:
    """Shares of samples (n, d) and reference points (m, d).

    Exact in float64: the result does not depend on `block`, which bounds memory at a few block x block and block x d
    arrays, nor on the device. Density and coverage are of closed balls too, where their authors' code has open ones.
    """
    real, fake = _pair(reference, samples, k, block, device)
    reach_real, reach_fake = _radii(real, k, block), _radii(fake, k, block)
    hit, covered = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    balls = torch.zeros(len(fake), dtype=torch.long, device=device)
    for at, to, near, slack in _distances(real, fake, block):
        outer, inner = reach_real[at, None], reach_fake[to]
        _refine(
            near,
            ((near - outer).abs() <= slack) | ((near - inner).abs() <= slack),
            real[at],
            fake[to],
        )
        inside = near <= outer
        balls[to] += inside.sum(0)
        covered[at] |= inside.any(1)
        hit[at] |= (near <= inner).any(1)
    precision, recall, coverage = ((x > 0).double().mean().item() for x in (balls, hit, covered))
    density = balls.double() / k
    return Shares(
        precision,
        recall,
        density.mean().item(),
        (density.std() / len(fake) ** 0.5).item(),
        coverage,
    )


def precision_recall_half(
    reference: ndarray,
    samples: ndarray,
    k: int = 3,
    block: int = ADM_BLOCK,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """The same shares in the arithmetic of ADM's evaluator, approximately: they come out 0.0005 to 0.003 higher.

    Features, norms, products and sums are rounded to half precision, which makes ties, and a tie is a hit. The k-th
    neighbour is counted among all rows, the centre included. A block with a value that is not finite is done again in
    single precision, so the result depends on `block`.
    """
    real, fake = (x.float() for x in _pair(reference, samples, k, block, device))
    with precision("fp32", real.device):
        return _half_shares(real, fake, k, block)


def _half_shares(real: Tensor, fake: Tensor, k: int, block: int) -> tuple[float, float]:
    reach_real, reach_fake = (_half_radii(x, k, block) for x in (real, fake))
    hit_real, hit_fake = (
        torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (real, fake)
    )
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            at, to = slice(i, i + block), slice(j, j + block)
            near = _half_distances(real[at], fake[to])
            hit_fake[to] |= (near <= reach_real[at, None]).any(0)
            hit_real[at] |= (near <= reach_fake[to]).any(1)
    return hit_fake.double().mean().item(), hit_real.double().mean().item()


def _pair(
    reference: ndarray, samples: ndarray, k: int, block: int, device: torch.device | str
) -> list[Tensor]:
    real, fake = rows("reference", reference), rows("samples", samples)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {fake.shape[1]}")
    if block < 1 or not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"need block >= 1 and 1 <= k < rows, got block {block}, k {k}, rows {len(real)} and {len(fake)}"
        )
    return [torch.from_numpy(x).to(device) for x in (real, fake)]


def _distances(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor, float]]:
    """Blocks |a|^2 + |b|^2 - 2 a.b of squared distances, and a bound on their difference from `_refine`'s.

    Each way is within 2 (d + 4) u (|a|^2 + |b|^2) of the truth in any order of summation, u = 2^-53; the bound has twice the room.
    """
    for i in range(0, len(a), block):
        at = slice(i, i + block)
        for j in range(0, len(b), block):
            to = slice(j, j + block)
            aa, bb = a[at].square().sum(1, keepdim=True), b[to].square().sum(1)
            slack = 4 * (a.shape[1] + 4) * np.finfo(float).eps * (aa.max() + bb.max()).item()
            yield at, to, torch.addmm(aa + bb, a[at], b[to].T, alpha=-2), slack


def _refine(near: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> None:
    """Replace the masked entries by sum (a - b)^2, the value that decides: it depends on the two rows only, not on the block."""
    at, to = mask.nonzero(as_tuple=True)
    for r, c in zip(at.split(4096), to.split(4096), strict=True):
        near[r, c] = (a[r] - b[c]).square().sum(1)


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """Squared distance from each row to its k-th nearest other row: (n,)."""
    nearest = torch.full((len(x), k), torch.inf, dtype=x.dtype, device=x.device)
    for at, to, near, slack in _distances(x, x, block):
        if at == to:
            near.fill_diagonal_(torch.inf)
        limit = nearest[at, -1]
        if near.shape[1] >= k:
            limit = torch.minimum(limit, near.topk(k, largest=False).values[:, -1] + slack)
        candidates = near <= (limit + slack)[:, None]
        _refine(near, candidates & near.isfinite(), x[at], x[to])
        near[~candidates] = torch.inf
        nearest[at] = torch.cat([nearest[at], near], 1).topk(k, largest=False).values
    return nearest[:, -1]


def _half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (rows of a, rows of b) by half-precision steps, in float32; wholly in float32 if one is not finite."""
    u, v = a.half(), b.half()
    uu, vv = u.square().float().sum(1).half()[:, None], v.square().float().sum(1).half()
    near = uu - 2 * (u.float() @ v.float().T).half() + vv
    if not near.isfinite().all():
        return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp_min_(0)
    return near.clamp_min_(0).float()


def _half_radii(x: Tensor, k: int, block: int) -> Tensor:
    reach = torch.empty(len(x), device=x.device)
    for i in range(0, len(x), block):
        nearest = [
            _half_distances(x[i : i + block], x[j : j + block]) for j in range(0, len(x), block)
        ]
        nearest = [part.topk(min(k + 1, part.shape[1]), largest=False).values for part in nearest]
        reach[i : i + block] = torch.cat(nearest, 1).topk(k + 1, largest=False).values[:, -1]
    return reach
