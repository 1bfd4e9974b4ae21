"""Sampling: every image from its own seed, whatever the batch size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import ClassifierGradient, System, condition_on_low_res
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.samplers import bind_sampler, has_uniform_steps
from experiments.engine.numerics.cuda_graphs import (
    Launch,
    SharedGraph,
    Step,
    run_eagerly,
    without_weight_cache,
)
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.randomness import ImageNoise, seed_at
from experiments.engine.runtime.preemption import Preempted, requested_stop
from experiments.engine.specs.spec import Checkpoint, Evaluate, Sampler, Train

AHEAD = 2  # steps that a GPU is given before it has done them


class CountingModel:
    """A network that counts the images it is given; over the images sampled, that is evaluations per image (NFE).

    Of a system base and upsampler count, and the gradients of its classifier do not. Raises Preempted where the job is
    asked to stop: a piece of work is many evaluations. `recorded`: the steps of its sampler, the same for all it is used for, are launched
    as CUDA graphs, which are kept as long as this is.
    """

    def __init__(self, model: Model | System, recorded: bool = False) -> None:
        self.model, self.own = model, 0
        self.graphs = SharedGraph() if recorded else None
        self.evaluations: dict[
            torch.Size, int
        ] = {}  # images given to the network in a recorded step, by the shape of x
        self.under_way: deque[torch.cuda.Event] = deque()
        self.classifier, self.upsampler = None, None
        if isinstance(model, System):
            self.model, self.classifier = model.base, model.classifier
            self.upsampler = CountingModel(model.upsampler) if model.upsampler else None

    @property
    def evaluated(self) -> int:
        return self.own + (self.upsampler.own if self.upsampler else 0)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        _stop_if_asked()
        self.own += len(x)
        return self.model(x, t, y)

    def launch(self, step: Step) -> Step:
        """What a sampler calls for its step. A replay runs no Python, so it counts what the first step of its shape did, which runs as it is."""
        if self.graphs is None:
            return step
        graph = self.graphs(step)

        def launched(x: Tensor, *rest: Tensor) -> Tensor:
            _stop_if_asked()
            before = self.own
            if x.shape not in self.evaluations:
                with without_weight_cache():
                    out = step(x, *rest)
                self.evaluations[x.shape] = self.own - before
            else:
                out = graph(x, *rest)
                self.own = before + self.evaluations[x.shape]
            self._pace(x.device)
            return out

        return launched

    def _pace(self, device: torch.device) -> None:
        """Wait until at most AHEAD steps are under way: a request to stop would wait for all that are, and their noise take memory."""
        if device.type == "cuda":
            self.under_way.append(torch.cuda.Event(blocking=True))
            self.under_way[-1].record()
            if len(self.under_way) > AHEAD:
                self.under_way.popleft().synchronize()

    def forget(self) -> None:
        """Let go of the graphs, whose steps hold this in turn, and of their memory."""
        self.graphs = None


def _stop_if_asked() -> None:
    if request := requested_stop():
        raise Preempted(request)


def can_capture_steps(spec: Evaluate) -> bool:
    """Whether a recording can hold the steps of a set's sampler: none is made of a classifier's gradient either."""
    return spec.classifier is None and has_uniform_steps(
        spec.sampler, build_diffusion(spec.train.diffusion).times
    )


def image_labels(policy: str, num: int, num_classes: int, seed: int) -> Tensor:
    """Labels (num,) of the images: 'balanced' cycles through the classes, 'random' draws each from (seed, index)."""
    if policy == "balanced":
        return torch.arange(num) % num_classes
    if policy == "random":
        return torch.tensor([seed_at("label", seed, index) % num_classes for index in range(num)])
    raise ValueError(f"unknown label policy {policy!r}; known: balanced, random")


def image_seeds(seed: int, num: int, of: str = "image") -> list[int]:
    """One seed an image, all different: the CPU generator reads 32 bits."""
    base = seed_at(of, seed)
    return [(base + index) % 2**32 for index in range(num)]


def generate_images(
    spec: Evaluate,
    model: Model | System | CountingModel,
    device: torch.device,
    batch: int,
    within: range | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sampled images (n, C, H, W) and their labels (n,), `batch` at a time, in order of their index; `within` limits the indices."""
    model = model if isinstance(model, CountingModel) else CountingModel(model)
    gradient = (
        ClassifierGradient(model.classifier, spec.sampler.classifier_scale)
        if spec.classifier
        else None
    )
    y, within = (
        image_labels(spec.labels, spec.num, spec.data.num_classes, spec.seed),
        within or range(spec.num),
    )
    seeds, seeds_above = (
        image_seeds(spec.seed, spec.num, of) for of in ("image", "upsampled image")
    )
    for start in range(within.start, within.stop, batch):
        part = slice(start, min(start + batch, within.stop))
        with precision(spec.precision, device):
            x = _sample(
                spec.train,
                spec.sampler,
                model,
                y[part].to(device),
                seeds[part],
                gradient,
                model.launch,
            )
            if (
                spec.upsampler
            ):  # between them, as ADM's scripts have it, lies a file of 8-bit images
                upsampler = condition_on_low_res(model.upsampler, from_uint8(to_uint8(x)))
                x = _sample(
                    spec.upsampler,
                    spec.upsampling,
                    upsampler,
                    y[part].to(device),
                    seeds_above[part],
                )
        yield x.cpu(), y[part]


def _sample(
    train: Train | Checkpoint,
    sampler: Sampler,
    model: Model,
    y: Tensor,
    seeds: list[int],
    gradient: Model | None = None,
    launch: Launch = run_eagerly,
) -> Tensor:
    """Samples (n, C, H, W) of a network for labels (n,), on their device."""
    data, diffusion = train.data, build_diffusion(train.diffusion)
    sample = bind_sampler(sampler, diffusion.to(y.device), gradient, launch)
    network = Guided(
        model,
        sampler.scale,
        data.num_classes,
        channels=sampler.channels,
        interval=sampler.interval,
        times=diffusion.times,
    )
    for x in sample(network, y, ImageNoise(seeds, (data.channels, data.size, data.size), y.device)):
        pass
    return x
