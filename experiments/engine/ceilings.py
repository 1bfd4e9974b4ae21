"""What a device reaches at most, measured: the rate of large matrix products in a numeric mode, and of copying memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from backbones import kernels
from experiments.engine.precision import flags, precision
from experiments.engine.spec import Ceilings
from experiments.engine.timing import half_quartiles, seconds

RUNS = 9
SIDES = {"cuda": 8192, "cpu": 2048}           # of the square matrices
COPIED = {"cuda": 2**30, "cpu": 2**28}        # bytes, more than any cache holds


def run(spec: Ceilings) -> dict[str, Any]:
    """Multiply-accumulates a second and bytes a second, read plus written; medians."""
    device = torch.device(spec.device)
    side = SIDES[device.type]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(device) for _ in range(2))
    source = torch.zeros(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode(), precision(spec.precision, device):
        if spec.precision == "bf16":
            a, b = a.bfloat16(), b.bfloat16()  # under autocast a product would cast them every time
        products = _times(lambda: kernels.linear(a, b), device)
        in_force = flags()
    copies = _times(lambda: target.copy_(source), device)
    return {
        "macs_per_s": side**3 / statistics.median(products),
        "macs_per_s_spread": half_quartiles([side**3 / each for each in products]),
        "bytes_per_s": 2 * COPIED[device.type] / statistics.median(copies),
        "bytes_per_s_spread": half_quartiles([2 * COPIED[device.type] / each for each in copies]),
        **in_force,
    }


def _times(task: Any, device: torch.device) -> list[float]:
    for _ in range(3):
        task()
    repeats = 10 if device.type == "cuda" else 1
    return [seconds(task, device, repeats) for _ in range(RUNS)]
