"""Time precision, recall, density and coverage on features as wide as Inception's."""

from __future__ import annotations

import numpy as np
import torch

from experiments.engine.benchmarks.spec import Neighbours
from experiments.engine.numerics.device import describe_device
from experiments.engine.numerics.precision import read_tf32_flags
from experiments.engine.records.store import Store, provenance
from experiments.engine.scoring.neighbours import (
    ADM_BLOCK,
    NEIGHBOURS,
    precision_recall,
    precision_recall_half,
)
from experiments.engine.timing.clock import time_call

# Rows of a block of the exact arithmetic on a CPU, whose caches hold no more.
CPU_BLOCK = 2000
# Sides of the matrices whose product is the ceiling.
PRODUCT_SIDES = {"cuda": 4096, "cpu": 1024}
PRODUCT_RUNS = 3


def measure_neighbours(spec: Neighbours, store: Store) -> None:
    """Time the shares of rectified Gaussians, print and record them.

    The second of two runs counts, because the first one allocates memory. A pair is one distance:
    all pairs of n samples and m reference points are n^2 + m^2 + n m. Rate and ceiling count
    fused multiply-adds, of which a distance takes `dim`.

    Raises:
        ValueError: the sets are too small to have neighbours.
    """
    if min(spec.samples, spec.reference) <= NEIGHBOURS or spec.dim < 1:
        raise ValueError(
            f"--sizes takes more than {NEIGHBOURS} samples and reference points, "
            "and a width from 1 on"
        )
    # Memory is kept from here on, so this comes before anything is timed.
    about = provenance() | describe_device(spec.device)
    about["precision_flags"] = read_tf32_flags()

    # Time the shares twice.
    device = torch.device(spec.device)
    exact = spec.arithmetic == "exact"
    block = CPU_BLOCK if exact and device.type == "cpu" else ADM_BLOCK
    compute = precision_recall if exact else precision_recall_half
    reference, samples = _draw_features(spec)
    shares: list[tuple[float, ...]] = []

    def run() -> None:
        result = compute(
            reference=reference, samples=samples, k=NEIGHBOURS, block=block, device=device
        )
        shares.append(result)

    run()
    seconds = time_call(run, device)

    # Set the rate beside that of a matrix product.
    pairs = spec.samples**2 + spec.reference**2 + spec.samples * spec.reference
    rate = spec.dim * pairs / seconds / 1e9
    ceiling = _measure_product(exact, min(PRODUCT_SIDES[device.type], block), device)
    values = {
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "gmacs_per_s": rate,
        "product_gmacs_per_s": ceiling,
        "share_of_product": rate / ceiling,
        "precision": shares[-1][0],
        "recall": shares[-1][1],
    }
    store.append(spec, "done", values, about)
    print(
        f"neighbours, {spec.arithmetic}: {spec.samples} x {spec.reference} x {spec.dim} "
        f"in {seconds:.2f} s, {pairs / seconds:.3g} pairs/s, {rate:.1f} GMAC/s, "
        f"{rate / ceiling:.0%} of a matrix product's",
        flush=True,
    )


def _draw_features(spec: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Draw reference and samples."""
    draw = np.random.default_rng(0)
    reference = np.maximum(draw.standard_normal((spec.reference, spec.dim), np.float32), 0)
    samples = np.maximum(draw.standard_normal((spec.samples, spec.dim), np.float32), 0)
    return reference, samples


def _measure_product(exact: bool, side: int, device: torch.device) -> float:
    """Measure the best of some products of square matrices, in 10^9 multiply-adds per second."""
    dtype = torch.float64 if exact else torch.float32
    square = torch.ones(side, side, dtype=dtype, device=device)
    seconds = min(time_call(lambda: square @ square, device, 3) for _ in range(PRODUCT_RUNS))
    return side**3 / seconds / 1e9
