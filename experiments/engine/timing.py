"""The timer: full batches of x, t and y, warm, synchronised, with the flags that were in force beside the figure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import backbones
from backbones import kernels
from experiments.engine.capture import Captured
from experiments.engine.data import ImageSet
from experiments.engine.diffusion import IDDPM
from experiments.engine.energy import joules
from experiments.engine.noise import ImageNoise
from experiments.engine.precision import flags, precision
from experiments.engine.randomness import generator_at, seed_at
from experiments.engine.samplers import Guided, ancestral
from experiments.engine.spec import Backbone, Data, Recipe, Timing, Train
from experiments.engine.train import Trainer

PAIRS, FEWEST = 7, 3
WARM_UP, STABLE = 10, 0.05  # runs at most, until two in a row take the same time to this part
PATIENCE = 10.0             # seconds; on a busy machine the pairs stop here once there are FEWEST
SCALE = 1.5                 # guidance; its value costs nothing
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
LIMITS = {"bf16": 2e-2, "tf32": 5e-3, "as_published": 5e-3}  # relative RMS error of an output against the reference kernels'

Task = Callable[[], Any]


def run(spec: Timing) -> dict[str, Any]:
    """Median images per second, its spread, and the ratio to the baseline, both networks timed in turn.

    The machine's speed drifts, so the ratio is the median of the ratios of neighbouring runs. Raises ValueError where
    the kernels that would be timed do not compute what the reference computes, forward and, for training, backward.
    """
    device = torch.device(spec.device)
    networks = [spec.backbone] if spec.baseline in (None, spec.backbone) else [spec.backbone, spec.baseline]
    with precision(spec.precision, device), kernels.use(**spec.kernels), _autotuned(spec):
        for backbone in networks:
            check(backbone, spec, device)
        kernels.reset_used()  # the record names what is timed, not what it was checked with
        tasks = [_task(backbone, spec, device) for backbone in networks]
        in_force = _read_back(device) | {"memory_format": spec.layout, "compiled": spec.compile}
        repeats = max([_warm(task, device) for task in tasks])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        pairs, used, started = [], [], time.perf_counter()
        while len(pairs) < FEWEST or (len(pairs) < PAIRS and time.perf_counter() - started < PATIENCE):
            before = joules(device)
            pairs.append([seconds(tasks[0], device, repeats, spec.precision != "as_published")])
            used.append(None if before is None else (joules(device) - before) / (repeats * spec.batch))
            pairs[-1] += [seconds(task, device, repeats, spec.precision != "as_published") for task in tasks[1:]]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    rates = [spec.batch / pair[0] for pair in pairs]
    ratios = [pair[-1] / pair[0] for pair in pairs]
    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_spread": half_quartiles(rates),
        "relative": statistics.median(ratios),
        "relative_spread": half_quartiles(ratios) if len(networks) > 1 else 0.0,
        "runs": len(pairs),
        "repeats": repeats,
        "peak_memory_bytes": peak,
        "joules_per_image": None if None in used else statistics.median(used),
        **in_force,
    }


def check(backbone: Backbone, spec: Timing, device: torch.device) -> None:
    """Refuse to time kernels whose results are not the reference's, by relative RMS error on one sample.

    Of training the gradients are checked too, all parameters' as one vector; half the digits go in a backward pass.
    """
    model = _network(backbone, spec, device)
    x, t, y = (part[:1] for part in _inputs(spec, device))
    timed = _results(model, (x, t, y), spec.what == "training")
    with kernels.use(**kernels.references()):
        expected = _results(model, (x, t, y), spec.what == "training")
    for what, out, truth, limit in zip(("output", "gradient"), timed, expected, (1, 2), strict=False):
        error = ((out - truth).float().square().mean().sqrt() / truth.float().square().mean().sqrt().clamp_min(1e-12)).item()
        limit *= LIMITS.get(spec.precision, 1e-4)
        if not error <= limit:
            raise ValueError(f"{backbone.name} with kernels {spec.kernels or 'auto'}: its {what} differs from its reference by {error:.1e} (limit {limit:.0e}); it is not timed")


def _results(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    """The output and, if asked for, the gradient of its product with noise by every parameter that has one."""
    if not backward:
        with torch.inference_mode():
            return [model(*inputs)]
    model.zero_grad()
    out = model(*inputs)
    noise = torch.randn(out.shape, generator=generator_at("check", device=out.device), device=out.device)
    with torch.autocast(out.device.type, enabled=False):
        (out.float() * noise).sum().backward()
    found = [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]
    model.zero_grad()
    return found


def _task(backbone: Backbone, spec: Timing, device: torch.device) -> Task:
    """A call that processes one batch."""
    if spec.what == "training":
        return _training(backbone, spec, device)
    model = _network(backbone, spec, device)
    if spec.compile:
        model = torch.compile(model)
    if spec.graphs:
        model = Captured(model)
    x, t, y = _inputs(spec, device)
    if spec.what == "forward":
        if spec.precision == "as_published":
            t, y = t[:1], y[:1]  # the authors' script: the conditioning of a single image, for the whole batch

        @torch.inference_mode()
        def forward() -> None:
            model(x, t, y)

        return forward
    if spec.what != "sampling":
        raise ValueError(f"unknown task {spec.what!r} to time; known: forward, training, sampling")
    diffusion = IDDPM.linear().respaced(spec.num_steps).to(device)
    network = Guided(model, SCALE, spec.num_classes)

    @torch.inference_mode()
    def sample() -> None:
        for _ in ancestral(diffusion, network, y, ImageNoise(range(spec.batch), tuple(x.shape[1:]), device)):
            pass

    return sample


def _training(backbone: Backbone, spec: Timing, device: torch.device) -> Task:
    """A step of the trainer as runs take it, loading included, on random images in memory."""
    data, draw = Data("random", spec.size, spec.channels, spec.num_classes), np.random.default_rng(0)
    shape = (4 * spec.batch, spec.channels, spec.size, spec.size)
    images = ImageSet(draw.standard_normal(shape, dtype=np.float32), draw.integers(spec.num_classes, size=shape[0]), data)
    recipe = Recipe(steps=10**9, batch=spec.batch, precision=spec.precision)
    network = backbone.but(input_size=spec.size, in_channels=spec.channels, num_classes=spec.num_classes)
    trainer = Trainer(Train(network, data, recipe), device, compiled=spec.compile)
    fill(trainer.model)
    stepping = trainer.steps(images)
    return lambda: next(stepping)


def fill(model: nn.Module) -> None:
    """Random weights where an initialisation left zeros: zero heads would make any kernel look right."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            std = 0.02 if parameter.ndim > 1 else 0.5  # biases open the gates, so that a branch's error reaches the output
            torch.nn.init.normal_(parameter, std=std, generator=generator_at("timing", name, device=parameter.device))


def _network(backbone: Backbone, spec: Timing, device: torch.device) -> nn.Module:
    if spec.layout not in LAYOUTS:
        raise ValueError(f"unknown layout {spec.layout!r}; known: {', '.join(LAYOUTS)}")
    options = backbone.options | dict(input_size=spec.size, in_channels=spec.channels, num_classes=spec.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("timing", "init"))
        model = backbones.build(backbone.name, **options)
    model = model.to(device=device, memory_format=LAYOUTS[spec.layout]).eval()
    fill(model)
    return model


def _inputs(spec: Timing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed_at("timing"))
    x = torch.randn(spec.batch, spec.channels, spec.size, spec.size, generator=draw)
    t = torch.randint(1000, (spec.batch,), generator=draw)
    y = torch.randint(spec.num_classes, (spec.batch,), generator=draw)
    return x.to(device=device, memory_format=LAYOUTS[spec.layout]), t.to(device), y.to(device)


def _warm(task: Task, device: torch.device) -> int:
    """Run until the time is stable; how often a run is repeated so that it lasts long enough for the clock."""
    latest, started = math.inf, time.perf_counter()
    for _ in range(WARM_UP):
        before, latest = latest, seconds(task, device)
        if abs(latest - before) <= STABLE * latest or time.perf_counter() - started > PATIENCE:
            break
    return max(1, math.ceil((0.3 if device.type == "cuda" else 0.05) / latest))


def seconds(task: Task, device: torch.device, repeats: int = 1, synchronise: bool = True) -> float:
    """Seconds of one run, the mean of `repeats`, from an idle device to an idle device; not `synchronise`: until all is launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        task()
    if device.type == "cuda" and synchronise:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def half_quartiles(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


@contextmanager
def _autotuned(spec: Timing) -> Iterator[None]:
    """cuDNN chooses its fastest convolution by trial, except in the authors' mode, which left the default."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = spec.precision != "as_published"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _read_back(device: torch.device) -> dict[str, Any]:
    autocast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if torch.is_autocast_enabled(device.type) else None
    return flags() | {"autocast": autocast, "cudnn_benchmark": torch.backends.cudnn.benchmark}
