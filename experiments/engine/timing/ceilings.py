"""What a device reaches at most: large matrix products, and copies of memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from backbones import kernels
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.specs.spec import Ceilings
from experiments.engine.timing.clock import half_interquartile_range, time_call

RUNS = 9
WARM_UP_RUNS = 3
# Sides of the square matrices; caches dislike some powers of two, so several are tried.
SIDES = {"cuda": (4096, 8192, 8064), "cpu": (1152, 1536, 2048)}
# Bytes of the copied tensor: more than any cache holds.
COPIED = {"cuda": 2**30, "cpu": 2**28}


def measure_ceilings(spec: Ceilings) -> dict[str, Any]:
    """Measure multiply-accumulates per second of the best matrix size, and bytes per second.

    A copied byte counts twice, as it is read and written. Rates are medians.
    """
    device = torch.device(spec.device)
    with torch.inference_mode(), precision(spec.precision, device):
        rates = {
            side: _measure_rates(side**3, _make_product(side, spec.precision, device), device)
            for side in SIDES[device.type]
        }
        tf32_flags = read_tf32_flags()

    copied = measure_copy_rates(device)
    best = max(rates, key=lambda side: statistics.median(rates[side]))
    return {
        "macs_per_s": statistics.median(rates[best]),
        "macs_per_s_spread": half_interquartile_range(rates[best]),
        "side": best,
        "bytes_per_s": statistics.median(copied),
        "bytes_per_s_spread": half_interquartile_range(copied),
        **tf32_flags,
    }


def measure_copy_rates(device: torch.device) -> list[float]:
    """Measure the bytes per second that a plain copy reads and writes, once a run."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return _measure_rates(2 * source.nbytes, lambda: target.copy_(source), device)


def _make_product(side: int, mode: str, device: torch.device) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(device) for _ in range(2))
    if mode == "bf16":
        # Under autocast, a product would cast float32 factors every time.
        a, b = a.bfloat16(), b.bfloat16()
    return lambda: kernels.linear(a, b)


def _measure_rates(amount: int, call: Callable[[], object], device: torch.device) -> list[float]:
    """Measure `amount` per second of a call that does so much, once a run."""
    for _ in range(WARM_UP_RUNS):
        call()
    repeats = 10 if device.type == "cuda" else 1
    return [amount / time_call(call, device, repeats) for _ in range(RUNS)]
