"""The timer: full batches of x, t and y, warm, synchronised, with the flags that were in force beside the figure."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backbones import kernels
from experiments.engine.numerics.cuda_graphs import CudaGraph, accelerate
from experiments.engine.numerics.device import read_joules
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing.operators import Operators
from experiments.engine.timing.tasks import (
    Task,
    build_network,
    build_sampling,
    build_task,
    build_trainer,
    combine_tasks,
    draw_inputs,
)

PAIRS, FEWEST = 7, 3
WARM_UP, STABLE = 10, 0.05  # runs at most, until two in a row take the same time to this part
PATIENCE = 10.0  # seconds; on a busy machine the pairs stop here once there are FEWEST
LIMITS = {
    "bf16": 2e-2,
    "tf32": 5e-3,
    "as_published": 5e-3,
}  # relative RMS error of an output against the reference kernels'


def measure_speed(spec: Timing) -> dict[str, Any]:
    """Median images per second, its spread, and the ratio to the baseline, both timed in turn; a system of several networks is all of them.

    The machine's speed drifts, so the ratio is the median of the ratios of neighbouring runs. Peak memory is that of the subject
    alone, before the baseline is built; `stable` is false where ten warm runs, or those of ten seconds, differed by more than 5 %. Raises
    ValueError where what would be timed does not compute what the reference computes, forward and, for training, backward.
    """
    device = torch.device(spec.device)
    free_memory(device)
    own = Cost(spec.backbone, spec.size, spec.channels, spec.num_classes)
    other = Cost(
        spec.baseline or spec.backbone,
        *(spec.baseline_input or (spec.size, spec.channels)),
        spec.num_classes,
    )
    systems = [(own, *spec.parts)] + [(other,)] * ((other,) != (own, *spec.parts))
    with precision(spec.precision, device), kernels.use(**spec.kernels):
        for network in {str(each): each for system in systems for each in system}.values():
            check_against_reference(network, spec, device)
        kernels.reset_used()  # the record names what is timed, not what it was checked with
        free_memory(device)
        replayed, compiled = CudaGraph.replayed, _compiled()
        tasks: list[Task] = []
        warmed: list[tuple[int, bool, int | None]] = []
        for system in systems:  # the subject first, so that its peak is its own
            _forget_peak(device)
            tasks.append(combine_tasks([build_task(network, spec, device) for network in system]))
            warmed.append(_warm(tasks[-1], device, spec.graphs))
        in_force = (
            _read_back(device)
            | tasks[0].seen
            | {"compiled": _compiled() > compiled, "graphs": CudaGraph.replayed > replayed}
        )
        moved = None if spec.compile or spec.graphs else _moved(tasks[0], device)
        repeats = max(each[0] for each in warmed)
        pairs, used, started = [], [], time.perf_counter()
        while len(pairs) < FEWEST or (
            len(pairs) < PAIRS and time.perf_counter() - started < PATIENCE
        ):
            before = read_joules(device)
            pairs.append([time_call(tasks[0], device, repeats, spec.precision != "as_published")])
            used.append(
                None if before is None else (read_joules(device) - before) / (repeats * spec.batch)
            )
            pairs[-1] += [
                time_call(each, device, repeats, spec.precision != "as_published")
                for each in tasks[1:]
            ]
    rates = [spec.batch / pair[0] for pair in pairs]
    ratios = [pair[-1] / pair[0] for pair in pairs]
    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_spread": half_interquartile_range(rates),
        "relative": statistics.median(ratios),
        "relative_spread": half_interquartile_range(ratios) if len(systems) > 1 else 0.0,
        "baseline_images_per_s": statistics.median(spec.batch / pair[-1] for pair in pairs)
        if spec.baseline
        else None,
        "baseline_one_condition": tasks[-1].seen["one_condition"] if spec.baseline else None,
        "runs": len(pairs),
        "repeats": repeats,
        "stable": all(stable for _, stable, _ in warmed),
        "peak_memory_bytes": warmed[0][2],
        "bytes_moved": moved,
        "joules_per_image": None if None in used else statistics.median(used),
        **in_force,
    }


def check_against_reference(network: Cost, spec: Timing, device: torch.device) -> None:
    """Refuse to time what does not compute what the reference kernels compute, by relative RMS error on one sample.

    Of training the gradients are checked too, all parameters' as one vector; half the digits go in a backward pass, or a second step. Where a network is
    compiled or recorded that is what runs, at the batch that is timed; of training the trainer's passes over it, of recorded sampling a loop
    of two steps.
    """
    training, fast = spec.what == "training", spec.compile or spec.graphs
    whole = (
        _passed
        if training and fast
        else _looped
        if spec.what == "sampling" and spec.graphs
        else None
    )
    model, inputs = build_network(network, spec, device), draw_inputs(network, spec, device)
    sample = [part[:1] for part in inputs]
    with kernels.use(**kernels.references()):
        expected = (
            whole(network, replace(spec, batch=1, compile=False, graphs=False), device, sample)
            if whole
            else _results(model, sample, training)
        )
    if whole:
        timed = whole(network, spec, device, sample)
    elif not fast:
        timed = _results(model, sample, training)
    else:
        given = [
            torch.cat([part] * (2 if spec.what == "sampling" else 1)) for part in inputs
        ]  # guidance doubles a batch
        timed = [_results(accelerate(model, spec.compile, spec.graphs), given, False)[0][:1]]
    for what, out, truth, limit in zip(
        ("loss" if training and fast else "output", "gradient"),
        timed,
        expected,
        (1 if whole is not _looped else 2, 2),
        strict=False,
    ):
        error = (
            (out - truth).float().square().mean().sqrt()
            / truth.float().square().mean().sqrt().clamp_min(1e-12)
        ).item()
        limit *= LIMITS.get(spec.precision, 1e-4)
        if not error <= limit:
            how = ", compiled" * spec.compile + ", by CUDA graphs" * spec.graphs
            raise ValueError(
                f"{network.backbone.name} with kernels {spec.kernels or 'auto'}{how}: its {what} differs from its reference by {error:.1e} (limit {limit:.0e}); it is not timed"
            )


def _passed(
    network: Cost, spec: Timing, device: torch.device, sample: list[Tensor]
) -> list[Tensor]:
    """Loss and gradients that the trainer's passes leave of a batch of one `sample` (x, t, y) over and over: those of the sample."""
    free_memory(device)
    trainer = build_trainer(network, spec, device)
    x, t, y = sample
    x = x[
        :, : trainer.spec.data.channels
    ]  # an upsampler is given images, and makes its own input of them
    eps = torch.randn(x.shape, generator=generator_at("check", device=device), device=device)
    x0, t, y, eps = (torch.cat([part] * spec.batch) for part in (x, t, y, eps))
    loss = trainer.forward_backward(x0, y, t, eps).clone()
    return [
        loss,
        torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]),
    ]


def _looped(
    network: Cost, spec: Timing, device: torch.device, sample: list[Tensor]
) -> list[Tensor]:
    """The first image of a loop of sampling, whose batch is one `sample` (x, t, y) over and over; the first one's noise does not depend on the batch."""
    return [
        build_sampling(
            network,
            replace(spec, num_steps=2),
            device,
            tuple(torch.cat([part] * spec.batch) for part in sample),
        ).run()[:1]
    ]


def _results(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    """The output and, if asked for, the gradient of its product with noise by every parameter that has one."""
    if not backward:
        with torch.inference_mode():
            return [model(*inputs)]
    model.zero_grad()
    out = model(*inputs)
    noise = torch.randn(
        out.shape, generator=generator_at("check", device=out.device), device=out.device
    )
    with torch.autocast(out.device.type, enabled=False):
        (out.float() * noise).sum().backward()
    found = [
        out.detach(),
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    ]
    model.zero_grad()
    return found


def free_memory(device: torch.device) -> None:
    """Give back the memory of earlier tasks on a GPU, where recordings and their owners hold each other, and drop what was compiled.

    Of a function with more than eight compiled versions the compiler would run the next as it is.
    """
    torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _warm(call: Task, device: torch.device, recorded: bool) -> tuple[int, bool, int | None]:
    """Run until the time is stable: (how often a run is repeated so that it lasts long enough for the clock, whether it became stable, peak bytes).

    The peak leaves the first run out, in which convolutions are tried, but where it is `recorded`: a replay works in memory that its graph holds.
    """
    latest, started, stable = math.inf, time.perf_counter(), False
    for i in range(WARM_UP):
        if i == 1 and not recorded:
            _forget_peak(device)
        before, latest = latest, time_call(call, device)
        stable = abs(latest - before) <= STABLE * latest
        if stable or time.perf_counter() - started > PATIENCE:
            break
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return max(1, math.ceil((0.3 if device.type == "cuda" else 0.05) / latest)), stable, peak


def _moved(call: Task, device: torch.device) -> int:
    """Bytes that the operators of one run read and write; of what is compiled or recorded nothing is seen."""
    with Operators(device) as operators:
        call()
    return operators.moved


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def time_call(
    call: Task, device: torch.device, repeats: int = 1, synchronise: bool = True
) -> float:
    """Seconds of one run, the mean of `repeats`, from an idle device to an idle device; not `synchronise`: until all is launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda" and synchronise:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def half_interquartile_range(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def _compiled() -> int:
    """Graphs that the compiler has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def _read_back(device: torch.device) -> dict[str, Any]:
    autocast = (
        str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        if torch.is_autocast_enabled(device.type)
        else None
    )
    return read_tf32_flags() | {
        "autocast": autocast,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
