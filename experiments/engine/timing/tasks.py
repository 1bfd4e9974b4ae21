"""What is timed: a forward pass, a step of the trainer, or a loop of guided sampling, of the kind that the network was made for.

A `network` is a backbone with its input; its registered options say whether it has a null label, and whether it is an upsampler, whose
input is an image and, after its channels, the low-resolution one. A network that has as many outputs as images have channels
predicts the noise alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.data.sets import ImageSet
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import condition_on_low_res
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.samplers import Ancestral
from experiments.engine.numerics.cuda_graphs import (
    SharedGraph,
    accelerate,
    require_gpu,
    run_eagerly,
)
from experiments.engine.numerics.randomness import ImageNoise, generator_at, seed_at
from experiments.engine.specs.spec import Backbone, Cost, Data, Diffusion, Recipe, Timing, Train
from experiments.engine.training.trainer import Trainer, build

SCALE = 1.5  # guidance; its value costs nothing
KEPT = 2  # networks, as they were drawn
UPSAMPLED = 4  # times a side, ADM's
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

_drawn: dict[str, nn.Module] = {}


@dataclass(frozen=True)
class Task:
    """Called, it processes one batch; `seen` is what was read back of its networks."""

    run: Callable[[], Any]
    seen: dict[str, Any]

    def __call__(self) -> None:
        self.run()


def combine_tasks(tasks: Sequence[Task]) -> Task:
    """A system of several networks, one after the other; of what was seen of them, all that there is."""
    if len(tasks) == 1:
        return tasks[0]
    layouts = sorted(
        {layout for task in tasks for layout in task.seen["memory_format"].split(", ")} - {"any"}
    )
    seen = {
        "memory_format": ", ".join(layouts) or "any",
        "one_condition": all(task.seen["one_condition"] for task in tasks),
    }
    return Task(lambda: [task() for task in tasks], seen)


def build_task(network: Cost, spec: Timing, device: torch.device) -> Task:
    """ValueError lists what can be timed.

    `one_condition` of what it has seen: whether time and label of a single image served the whole batch, as in the authors' script, which
    a network that makes tokens of them cannot take.
    """
    known = {"forward": _forward, "training": _training, "sampling": build_sampling}
    if spec.what not in known:
        raise ValueError(f"unknown task {spec.what!r} to time; known: {', '.join(known)}")
    return known[spec.what](network, spec, device)


def _forward(network: Cost, spec: Timing, device: torch.device) -> Task:
    model, (x, t, y) = build_network(network, spec, device), draw_inputs(network, spec, device)
    one = spec.precision == "as_published" and _takes_one_condition(model, x, t, y)
    if one:
        t, y = t[:1], y[:1]
    accelerate(model, spec.compile, spec.graphs)

    @torch.inference_mode()
    def forward() -> None:
        model(x, t, y)

    return Task(
        forward, {"memory_format": read_layout(x, *model.parameters()), "one_condition": one}
    )


@torch.inference_mode()
def _takes_one_condition(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> bool:
    try:
        model(x, t[:1], y[:1])
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # sizes that do not fit
        return False
    return True


def build_sampling(
    network: Cost,
    spec: Timing,
    device: torch.device,
    inputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Task:
    """Guided by the null label; without one the second half of the batch has a real one's, which costs the same. Run, it returns the images.

    `inputs`: x, t and y instead of the usual, of which an upsampler's low-resolution images and the labels are taken.
    """
    model, (x, _, y) = (
        build_network(network, spec, device),
        inputs or draw_inputs(network, spec, device),
    )
    if spec.graphs:
        require_gpu(device)
    data, diffusion = training_data(network), training_diffusion(network, model)
    steps, launch = (
        build_diffusion(diffusion).respaced(spec.num_steps).to(device),
        SharedGraph() if spec.graphs else run_eagerly,
    )
    accelerate(model, spec.compile)
    low = (
        None
        if diffusion.low_res is None
        else F.interpolate(x[:, : data.channels], diffusion.low_res, mode="area")
    )
    called = model if low is None else condition_on_low_res(model, torch.cat([low, low]))
    guided = Guided(
        called, SCALE, network.num_classes if has_null_label(network) else 0, channels=None
    )

    @torch.inference_mode()
    def sample() -> Tensor:
        noise = ImageNoise(range(len(x)), (data.channels, data.size, data.size), device)
        for images in Ancestral(steps, launch=launch)(guided, y, noise):
            pass
        return images

    return Task(
        sample, {"memory_format": read_layout(x, *model.parameters()), "one_condition": False}
    )


def _training(network: Cost, spec: Timing, device: torch.device) -> Task:
    """A step of the trainer as runs take it, loading included, on random images in memory."""
    trainer, draw = build_trainer(network, spec, device), np.random.default_rng(0)
    data = trainer.spec.data
    shape = (4 * spec.batch, data.channels, data.size, data.size)
    stepping = trainer.steps(
        ImageSet(
            draw.standard_normal(shape, dtype=np.float32),
            draw.integers(data.num_classes, size=shape[0]),
            data,
        )
    )
    return Task(
        lambda: next(stepping),
        {"memory_format": read_layout(*trainer.model.parameters()), "one_condition": False},
    )


def build_trainer(network: Cost, spec: Timing, device: torch.device) -> Trainer:
    """By the common recipe, whose steps cost what any other's do, without label dropout where there is no null label to drop to."""
    recipe = Recipe(
        steps=10**9,
        batch=spec.batch,
        precision=spec.precision,
        label_dropout=0.1 if has_null_label(network) else 0.0,
    )
    model = draw_network(size_backbone(network), device).to(memory_format=_layout(spec))
    declared = Train(
        size_backbone(network), training_data(network), recipe, training_diffusion(network, model)
    )
    trainer = Trainer(declared, device, compiled=spec.compile, graphs=spec.graphs, model=model)
    fill_zeros(model)
    return trainer


def training_data(network: Cost) -> Data:
    """The images that a network is trained on and makes; of an upsampler those of half its input's channels."""
    return Data(
        "random",
        network.size,
        network.channels // 2 if is_upsampler(network) else network.channels,
        network.num_classes,
    )


def training_diffusion(network: Cost, model: nn.Module) -> Diffusion:
    """DiT's steps, with the variance learned where the network predicts one."""
    data = training_data(network)
    low_res = max(1, data.size // UPSAMPLED) if is_upsampler(network) else None
    return Diffusion(
        variance="learned" if model.out_channels == 2 * data.channels else "fixed", low_res=low_res
    )


def is_upsampler(network: Cost) -> bool:
    return _option(network, "low_res", False)


def has_null_label(network: Cost) -> bool:
    return _option(network, "null_label", True)


def _option(network: Cost, name: str, default: bool) -> bool:
    return (backbones.options_of(network.backbone.name) | network.backbone.options).get(
        name, default
    )


def size_backbone(network: Cost) -> Backbone:
    return network.backbone.but(
        input_size=network.size, in_channels=network.channels, num_classes=network.num_classes
    )


def fill_zeros(model: nn.Module) -> None:
    """Random weights where an initialisation left zeros: zero heads would make any kernel look right."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            std = (
                0.02 if parameter.ndim > 1 else 0.5
            )  # biases open the gates, so that a branch's error reaches the output
            torch.nn.init.normal_(
                parameter, std=std, generator=generator_at("timing", name, device=parameter.device)
            )


def draw_network(spec: Backbone, device: torch.device) -> nn.Module:
    """`build` of seed 0, the latest of which are kept on the CPU: drawing a large network's weights takes longer than timing it."""
    if (name := str(spec)) not in _drawn:
        while len(_drawn) >= KEPT:
            del _drawn[next(iter(_drawn))]
        _drawn[name] = build(spec, 0, torch.device("cpu"))
    return copy.deepcopy(_drawn[name]).to(device)


def build_network(network: Cost, spec: Timing, device: torch.device) -> nn.Module:
    model = draw_network(size_backbone(network), device).to(memory_format=_layout(spec)).eval()
    fill_zeros(model)
    return model


def draw_inputs(network: Cost, spec: Timing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What the network is called with: x, t and y of a batch."""
    draw = torch.Generator().manual_seed(seed_at("timing"))
    x = torch.randn(spec.batch, network.channels, network.size, network.size, generator=draw)
    t = torch.randint(1000, (spec.batch,), generator=draw)
    y = torch.randint(network.num_classes, (spec.batch,), generator=draw)
    return x.to(device=device, memory_format=_layout(spec)), t.to(device), y.to(device)


def _layout(spec: Timing) -> torch.memory_format:
    if spec.layout not in LAYOUTS:
        raise ValueError(f"unknown layout {spec.layout!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[spec.layout]


def read_layout(*tensors: Tensor) -> str:
    """The layouts of the four-dimensional ones that lie in one alone, as those of several channels and pixels do; 'any' where there are none."""
    images = [tensor for tensor in tensors if tensor.ndim == 4]
    held = [
        [name for name, layout in LAYOUTS.items() if image.is_contiguous(memory_format=layout)]
        for image in images
    ]
    return ", ".join(sorted({name for names in held if len(names) == 1 for name in names})) or "any"
