"""Tasks to time: a forward pass, a step of the trainer, or a loop of guided sampling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.objective import refuse_autoregressive
from experiments.engine.autoregressive.scales import RaceDraw, ScaleSystem, draw_images
from experiments.engine.data.sets import ImageSet
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import condition_on_low_res
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import IDDPM, Model
from experiments.engine.diffusion.samplers import Ancestral
from experiments.engine.numerics.cuda_graphs import (
    Launch,
    SharedGraph,
    accelerate,
    require_gpu,
    run_eagerly,
)
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import (
    Cost,
    Data,
    Recipe,
    Sampler,
    Timing,
    Tokenizer,
    Train,
)
from experiments.engine.timing.networks import (
    build_network,
    build_tokenizer,
    count_tokens,
    draw_inputs,
    draw_network,
    draw_scale_inputs,
    fill_zeros,
    has_null_label,
    layout_of,
    read_layout,
    size_backbone,
    training_data,
    training_diffusion,
)
from experiments.engine.training.next_scale.tokens import TokenSet
from experiments.engine.training.trainer import Trainer

# The guidance scale; its value costs nothing.
SCALE = 1.5


@dataclass(frozen=True)
class Task:
    """Work that processes one batch when it is called."""

    run: Callable[[], Any]
    # The layouts of the networks' tensors, as `read_layout` names them.
    memory_format: str = "any"
    # Whether time and label of a single image serve the whole batch, as in the authors' script.
    one_condition: bool = False
    # Bytes of the networks and inputs that a forward pass finds, and of the networks alone; 0 for
    # other tasks.
    held_bytes: int = 0
    weights_bytes: int = 0

    def __call__(self) -> None:
        self.run()


def combine_tasks(tasks: Sequence[Task]) -> Task:
    """Return one task that runs several networks in turn, for a system such as a cascade."""
    if len(tasks) == 1:
        return tasks[0]
    layouts: set[str] = set()
    for task in tasks:
        layouts.update(task.memory_format.split(", "))

    def run_all() -> None:
        for task in tasks:
            task()

    return Task(
        run=run_all,
        memory_format=", ".join(sorted(layouts - {"any"})) or "any",
        one_condition=all(task.one_condition for task in tasks),
        held_bytes=sum(task.held_bytes for task in tasks),
        weights_bytes=sum(task.weights_bytes for task in tasks),
    )


def build_task(network: Cost, spec: Timing, device: torch.device) -> Task:
    """Build the declared task around a network.

    Raises:
        ValueError: the task or the layout is unknown, or graphs are requested on a CPU.
    """
    builders = {"forward": _build_forward, "training": _build_training, "sampling": build_sampling}
    require_task(network, spec)
    if spec.what not in builders:
        raise ValueError(f"unknown task {spec.what!r} to time; known: {', '.join(builders)}")
    if network.tokenizer:
        return _build_scales(network, spec, device)
    return builders[spec.what](network, spec, device)


def require_task(network: Cost, spec: Timing) -> None:
    """Raise ValueError for a task that no network of this kind has.

    Scales differ in size, so they are compiled and captured in one pass over all of them alone.
    """
    if network.tokenizer is None:
        refuse_autoregressive(network.backbone.name)
    accelerated = spec.compile or spec.graphs
    if network.tokenizer and accelerated and spec.what != "forward":
        raise ValueError(
            f"{network.backbone.name} is compiled and captured for a forward pass alone; leave out "
            f"both for {spec.what}"
        )


def _build_scales(network: Cost, spec: Timing, device: torch.device) -> Task:
    """Build a task around an autoregressive network.

    A forward pass and a step of training see all scales at once. Sampling draws them in turn,
    guided, with a cache; it ends before the tokenizer's decoder.
    """
    tokenizer = build_tokenizer(network, device)
    if spec.what == "training":
        return _build_scale_training(network, spec, device, tokenizer)
    model = build_network(network, spec, device)
    y, inputs = draw_scale_inputs(network, spec, device)
    if spec.what == "forward":
        accelerate(model, spec.compile, spec.graphs)
        return Task(torch.inference_mode()(lambda: model(y, inputs)))

    # The noise of every image is drawn as in sampling.
    system = ScaleSystem(model, tokenizer)
    sampler = Sampler("scales", len(system.tokenizer.sides), SCALE)
    draw = RaceDraw(range(len(y)))
    return Task(torch.inference_mode()(lambda: draw_images(system, sampler, y, draw).features))


def _build_scale_training(
    network: Cost, spec: Timing, device: torch.device, tokenizer: nn.Module
) -> Task:
    """Build a step of the trainer on random tokens in memory, by the common recipe."""
    assert network.tokenizer, "an autoregressive network declares its tokenizer"
    backbone = size_backbone(network)
    data = Data("random", network.size, network.channels, network.num_classes)
    recipe = Recipe(steps=10**9, batch=spec.batch, precision=spec.precision)
    train = Train(backbone, data, recipe, tokenizer=Tokenizer(network.tokenizer))
    resources = Resources(str(device), watch_every=0)
    model: Any = draw_network(backbone, device)
    trainer = Trainer(train, resources, model=model, tokenizer=tokenizer)

    draw = torch.Generator().manual_seed(0)
    num = 4 * spec.batch
    tokens = torch.randint(model.vocabulary, (num, count_tokens(network)), generator=draw)
    labels = torch.randint(network.num_classes, (num,), generator=draw)
    steps = trainer.steps(TokenSet(tokens, labels, {}))
    return Task(lambda: next(steps))


def _build_forward(network: Cost, spec: Timing, device: torch.device) -> Task:
    """Build a forward pass over one batch."""
    model = build_network(network, spec, device)
    x, t, y = draw_inputs(network, spec, device)

    # The authors' script passes one time and one label for the whole batch.
    one_condition = spec.precision == "as_published" and _takes_one_condition(model, x, t, y)
    if one_condition:
        t, y = t[:1], y[:1]
    accelerate(model, spec.compile, spec.graphs)

    @torch.inference_mode()
    def forward() -> None:
        model(x, t, y)

    layout = read_layout(x, *model.parameters())
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    held = weights + sum(each.nbytes for each in (x, t, y))
    return Task(forward, layout, one_condition, held, weights)


@torch.inference_mode()
def _takes_one_condition(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> bool:
    """Tell whether a single condition serves the batch; networks that make tokens of it refuse."""
    try:
        model(x, t[:1], y[:1])
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # the sizes do not fit
        return False
    return True


def build_sampling(
    network: Cost,
    spec: Timing,
    device: torch.device,
    inputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Task:
    """Build a loop of guided ancestral sampling; the task's `run` returns the images.

    A network without a null label is guided by label 1, which costs the same.

    Args:
        network: the network and its input.
        spec: the timing.
        device: where the loop runs.
        inputs: x, t and y in place of the usual ones. The loop takes the labels from them and,
            for an upsampler, the low-resolution images.
    """
    if spec.graphs:
        require_gpu(device)
    model = build_network(network, spec, device)
    x, _, y = inputs or draw_inputs(network, spec, device)
    data = training_data(network)
    diffusion = training_diffusion(network, model)
    process = build_diffusion(diffusion)
    assert isinstance(process, IDDPM), process
    steps = process.respaced(spec.num_steps).to(device)
    accelerate(model, spec.compile)

    # An upsampler sees the low-resolution images at both halves of the guided batch.
    called: Model = model
    if diffusion.low_res is not None:
        low_res = F.interpolate(x[:, : data.channels], diffusion.low_res, mode="area")
        called = condition_on_low_res(model, torch.cat([low_res, low_res]))
    null_label = network.num_classes if has_null_label(network) else 1
    guided = Guided(called, SCALE, null_label, channels=None)

    # One captured step serves all runs of the loop.
    launch: Launch = SharedGraph() if spec.graphs else run_eagerly
    shape = (data.channels, data.size, data.size)

    @torch.inference_mode()
    def sample() -> Tensor:
        noise = ImageNoise(range(len(x)), shape, device)
        # Keep the latest images alone: all of a loop's steps would not fit the memory.
        images = Ancestral(steps, launch=launch)(guided, y, noise)
        # A captured step does the work on captions itself.
        with nullcontext() if spec.graphs else backbones.once_per_caption(model, y):
            return deque(images, maxlen=1).pop()

    return Task(sample, read_layout(x, *model.parameters()))


def _build_training(network: Cost, spec: Timing, device: torch.device) -> Task:
    """Build a step of the trainer, loading included, on random images in memory."""
    trainer = build_trainer(network, spec, device)
    data = trainer.spec.data
    draw = np.random.default_rng(0)
    shape = (4 * spec.batch, data.channels, data.size, data.size)
    pixels = draw.standard_normal(shape, dtype=np.float32)
    labels = draw.integers(max(1, data.num_classes), size=shape[0])
    steps = trainer.steps(ImageSet(pixels, labels, data))
    return Task(lambda: next(steps), read_layout(*trainer.model.parameters()))


def build_trainer(network: Cost, spec: Timing, device: torch.device) -> Trainer:
    """Build a trainer by the common recipe; other recipes' steps cost the same.

    Labels are dropped only if the network has a null label to replace them.
    """
    recipe = Recipe(
        steps=10**9,
        batch=spec.batch,
        precision=spec.precision,
        label_dropout=0.1 if has_null_label(network) else 0.0,
    )

    # The trainer gets a network in the layout of the timing.
    backbone = size_backbone(network)
    model = draw_network(backbone, device).to(memory_format=layout_of(spec))
    train = Train(backbone, training_data(network), recipe, training_diffusion(network, model))
    resources = Resources(str(device), watch_every=0, compile=spec.compile, graphs=spec.graphs)
    trainer = Trainer(train, resources, model=model)

    # Weights that start at zero are drawn, or the steps would pass on zeros.
    fill_zeros(model)
    return trainer
