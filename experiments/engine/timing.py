"""The timer: full batches of x, t and y, warm, synchronised, with the flags that were in force beside the figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import backbones
from backbones import kernels
from experiments.engine.precision import flags, precision
from experiments.engine.randomness import generator_at, seed_at
from experiments.engine.spec import Backbone, Cost, Timing

PAIRS, FEWEST, WARM_UP = 7, 3, 2
Part = tuple[nn.Module, tuple[torch.Tensor, ...]]  # a network and its inputs
PATIENCE = 10.0  # seconds; on a busy machine the pairs stop here once there are FEWEST


def run(spec: Timing) -> dict[str, Any]:
    """Median images per second, its spread, and the ratio to the baseline, both timed in turn; a system of several networks is all of them.

    The machine's speed drifts, so the ratio is the median of the ratios of neighbouring runs. Raises ValueError where
    the kernels that would be timed do not compute what the reference computes.
    """
    device = torch.device(spec.device)
    own = Cost(spec.backbone, spec.size, spec.channels, spec.num_classes)
    other = Cost(spec.baseline or spec.backbone, *(spec.baseline_input or (spec.size, spec.channels)), spec.num_classes)
    subject = [_part(cost, spec, device) for cost in (own, *spec.parts)]
    baseline = subject if (other, ()) == (own, spec.parts) else [_part(other, spec, device)]
    with torch.inference_mode(), precision(spec.precision, device), kernels.use(**spec.kernels):
        for (model, inputs), cost in zip([*subject, *(baseline if baseline is not subject else ())], (own, *spec.parts, other)):
            check(model, inputs, cost.backbone.name, spec)
        kernels.reset_used()  # the record names what is timed, not what it was checked with
        in_force = flags()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            _seconds(subject, device)
            _seconds(baseline, device)
        pairs, started = [], time.perf_counter()
        while len(pairs) < FEWEST or (len(pairs) < PAIRS and time.perf_counter() - started < PATIENCE):
            pairs.append((_seconds(subject, device), _seconds(baseline, device)))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    rates = [spec.batch / seconds for seconds, _ in pairs]
    ratios = [other / seconds for seconds, other in pairs]
    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_spread": _half_quartiles(rates),
        "relative": statistics.median(ratios) if baseline is not subject else 1.0,
        "relative_spread": _half_quartiles(ratios) if baseline is not subject else 0.0,
        "runs": len(pairs),
        "peak_memory_bytes": peak,
        **in_force,
    }


def check(model: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, spec: Timing) -> None:
    """Refuse to time kernels whose output is not the reference's, by relative RMS error on the first sample."""
    few = tuple(part[:1] for part in inputs)
    out = model(*few)
    with kernels.use(**kernels.references()):
        expected = model(*few)
    error = ((out - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt().clamp_min(1e-12)).item()
    limit = 2e-2 if spec.precision == "bf16" else 5e-3 if spec.precision == "tf32" else 1e-4
    if not error <= limit:
        raise ValueError(f"{name} with kernels {spec.kernels or 'auto'} differs from its reference by {error:.1e} (limit {limit:.0e}); it is not timed")


def _half_quartiles(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def _part(cost: Cost, spec: Timing, device: torch.device) -> Part:
    return _network(cost, device), _inputs(cost, spec.batch, device)


def _network(cost: Cost, device: torch.device) -> nn.Module:
    """The network with random weights everywhere: zero-initialised heads would make any kernel look right."""
    options = cost.backbone.options | dict(input_size=cost.size, in_channels=cost.channels, num_classes=cost.num_classes)
    model = backbones.build(cost.backbone.name, **options).to(device=device, memory_format=torch.channels_last).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            std = 0.02 if parameter.ndim > 1 else 0.5  # biases open the gates, so that a branch's error reaches the output
            torch.nn.init.normal_(parameter, std=std, generator=generator_at("timing", name, device=device))
    return model


def _inputs(cost: Cost, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed_at("timing"))
    x = torch.randn(batch, cost.channels, cost.size, cost.size, generator=draw)
    t = torch.randint(1000, (batch,), generator=draw)
    y = torch.randint(cost.num_classes, (batch,), generator=draw)
    return x.to(device=device, memory_format=torch.channels_last), t.to(device), y.to(device)


def _seconds(parts: Sequence[Part], device: torch.device) -> float:
    """Seconds of one synchronised forward pass of each part; on CUDA the mean of ten, so that launches overlap as in use."""
    repeats = 10 if device.type == "cuda" else 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        for model, inputs in parts:
            model(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats
