"""What a device reaches at most, measured: the rate of large matrix products in a numeric mode, and of copying memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from backbones import kernels
from experiments.engine.precision import flags, precision
from experiments.engine.spec import Ceilings
from experiments.engine.timing import half_quartiles, seconds

RUNS = 9
SIDES = {
    "cuda": (4096, 8192, 8064),
    "cpu": (1152, 1536, 2048),
}  # of square matrices; caches dislike some powers of two
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, more than any cache holds


def measure_ceilings(spec: Ceilings) -> dict[str, Any]:
    """Multiply-accumulates a second, of the best of some sizes, and bytes a second, read plus written; medians."""
    device = torch.device(spec.device)
    with torch.inference_mode(), precision(spec.precision, device):
        rates = {
            side: _rates(side**3, _product(side, spec.precision, device), device)
            for side in SIDES[device.type]
        }
        in_force = flags()
    copied = copy_rates(device)
    best = max(rates, key=lambda side: statistics.median(rates[side]))
    return {
        "macs_per_s": statistics.median(rates[best]),
        "macs_per_s_spread": half_quartiles(rates[best]),
        "side": best,
        "bytes_per_s": statistics.median(copied),
        "bytes_per_s_spread": half_quartiles(copied),
        **in_force,
    }


def copy_rates(device: torch.device) -> list[float]:
    """Bytes a second that a plain copy reads and writes, of every run."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return _rates(2 * source.nbytes, lambda: target.copy_(source), device)


def _product(side: int, mode: str, device: torch.device) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(device) for _ in range(2))
    if mode == "bf16":
        a, b = a.bfloat16(), b.bfloat16()  # under autocast a product would cast them every time
    return lambda: kernels.linear(a, b)


def _rates(amount: int, task: Callable[[], Any], device: torch.device) -> list[float]:
    for _ in range(3):
        task()
    repeats = 10 if device.type == "cuda" else 1
    return [amount / seconds(task, device, repeats) for _ in range(RUNS)]
