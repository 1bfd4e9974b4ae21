"""Run the first bad step of a training again, and find where it leaves the finite numbers.

The weights are those that the step began with, because `Freeze` kept them. Images, times and noise
are functions of the step's position, so they are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.engine.data.sets import AnySet, batch_indices, iterate_batches
from experiments.engine.numerics.parts import are_finite
from experiments.engine.numerics.precision import precision
from experiments.engine.training.trainer import Trainer


@dataclass(frozen=True)
class Finding:
    """The first values of a pass that are not finite."""

    # Name of the module; 'images' or 'noisy images' for what the network was given, or 'loss'.
    module: str
    # 'forward': the module's output. 'backward': the gradient at its output or of its weights.
    direction: str
    # Which images of the pass have them, (N,); None: the values are not of single images.
    images: Tensor | None = None


def replay(trainer: Trainer, images: AnySet) -> dict[str, Any]:
    """Run the step that was not made again, in its own precision and in fp32.

    This process runs the images of all ranks, in their shares. Processes that share the network
    all call this, and run the same.

    Returns:
        Step, counted from 1; the first parameter that is not finite, or None; and for each
        precision whether the step is finite, and else its module, direction, times and images.
    """
    step = trainer.freeze.step
    assert step is not None
    modes = dict.fromkeys((trainer.spec.recipe.precision, "fp32"))
    return {
        "step": step + 1,
        "parameter": first_bad_parameter(trainer.model),
        "passes": {mode: _run(trainer, images, step, mode) for mode in modes},
    }


def first_bad_parameter(model: nn.Module) -> str | None:
    """Return the name of the first parameter with a value that is not finite."""
    names, weights = zip(*model.named_parameters(), strict=True)
    return next((name for name, ok in zip(names, are_finite(weights), strict=True) if not ok), None)


def describe(diagnosis: dict[str, Any]) -> str:
    """Return a diagnosis as the end of a message."""
    parts = []
    for mode, outcome in diagnosis["passes"].items():
        if outcome["is_finite"]:
            parts.append(f"{mode} is finite")
            continue
        what = {"forward": "output", "backward": "gradient"}[outcome["direction"]]
        times = outcome["times"]
        at = ""
        if times:
            span = f"{times[0]:g}" if len(times) == 1 else f"{times[0]:g} to {times[-1]:g}"
            at = f", at t {span}"
        parts.append(f"in {mode} {outcome['module']} is the first whose {what} is not finite{at}")

    weights = diagnosis["parameter"]
    before = f", from weights that are not finite before it (first {weights})" if weights else ""
    return f"; run again{before}: {'; '.join(parts)}"


def _run(trainer: Trainer, images: AnySet, step: int, mode: str) -> dict[str, Any]:
    """Run a step in a precision, up to the first pass that is not finite."""
    for inputs, numbers in _passes(trainer, images, step):
        finding = _run_pass(trainer, inputs, mode)
        if finding is None:
            continue

        # Values that are not of single images are of all of them.
        y = inputs[1]
        bad = torch.ones_like(y, dtype=torch.bool) if finding.images is None else finding.images
        times = inputs[2][bad].tolist() if trainer.spec.tokenizer is None else []
        return {
            "is_finite": False,
            "module": finding.module,
            "direction": finding.direction,
            "times": sorted(set(times)),
            "images": list(compress(numbers, bad.tolist())),
        }
    return {"is_finite": True}


def _passes(
    trainer: Trainer, images: AnySet, step: int
) -> Iterator[tuple[tuple[Tensor, ...], list[int]]]:
    """Yield what each pass of a step was given, on all ranks, and the numbers of its images."""
    recipe, seed = trainer.spec.recipe, trainer.spec.seed
    numbers = batch_indices(len(images), recipe.batch, seed, step).tolist()
    for rank in range(trainer.group.world_size):
        shard = replace(trainer.group, rank=rank).shard(recipe.batch)
        batches = iterate_batches(
            images, recipe.batch, seed, range(step, step + 1), trainer.device, shard
        )
        for x0, y in batches:
            inputs = trainer.draw(step, x0, y, images.flip, shard)
            for start in range(0, len(x0), trainer.micro_batch):
                part = slice(start, start + trainer.micro_batch)
                yield tuple(value[part] for value in inputs), numbers[shard][part]


def _run_pass(trainer: Trainer, inputs: tuple[Tensor, ...], mode: str) -> Finding | None:
    """Run images forward and backward, and return the first values that are not finite."""
    x0 = inputs[0]
    if _bad_images(x0).any():
        return Finding("images", "forward", _bad_images(x0))

    # Forward, as in the step.
    ear = _Ear(len(x0))
    with precision(mode, trainer.device), ear.listening(trainer.model, trainer.entry):
        _, losses = trainer.losses(trainer.entry, *inputs)
    ear.judge("forward", "loss", losses)
    if "forward" in ear.findings:
        return ear.findings["forward"]

    # Backward, at the scale of the step. The gradients do not touch those of the parameters.
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss = losses.sum() / trainer.spec.recipe.batch * trainer.group.world_size
    gradients = _gradients_of(trainer, loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        ear.judge("backward", name.rpartition(".")[0] or ear.name, gradient)
    return ear.findings.get("backward")


def _gradients_of(
    trainer: Trainer, loss: Tensor, parameters: list[nn.Parameter]
) -> Sequence[Tensor | None]:
    """Return the gradients of a loss; of a shared network, NaN in the place of a bad one alone."""
    if not trainer.is_parted:
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    # A shared network has its gradients on its parameters alone, in parts.
    trainer.optimizer.zero_grad()
    loss.backward()
    finite = are_finite([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    trainer.optimizer.zero_grad()
    return [None if ok else torch.tensor(math.nan) for ok in finite]


def _bad_images(values: Tensor) -> Tensor:
    """Return which images have a value that is not finite, (N,)."""
    return ~values.detach().isfinite().reshape(len(values), -1).all(dim=1)


class _Ear:
    """Hears all values that the modules of a network hand on, and keeps the first bad ones.

    A module that is given bad values, while no module has put any out, is not to blame: they come
    from the operations of the module around it.

    Attributes:
        findings: by direction.
        name: of the network as a whole.
    """

    def __init__(self, num: int) -> None:
        """Listen to a pass of `num` images."""
        self.num = num
        self.findings: dict[str, Finding] = {}
        self.name = ""
        # Names of the modules that run, from the outermost one.
        self._running: list[str] = []

    @contextmanager
    def listening(self, network: nn.Module, entry: nn.Module) -> Iterator[None]:
        """Hear the modules of a network inside the block. Its losses call `entry`."""
        self.name = type(network).__name__
        named = {name or self.name: module for name, module in network.named_modules()}
        known = set(network.modules())
        named |= {
            name or f"{self.name} as trained": module
            for name, module in entry.named_modules()
            if module not in known
        }
        with ExitStack() as hooks:
            for name, module in named.items():
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                before = module.register_forward_pre_hook(enter, with_kwargs=True)
                hooks.callback(before.remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            yield

    def _enter(self, name: str, _: nn.Module, inputs: Any, options: Any) -> None:
        around = self._running[-1] if self._running else "noisy images"
        self.judge("forward", around, (inputs, options))
        self._running.append(name)

    def _leave(self, name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self.judge("forward", name, output)
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(self.judge, "backward", name))

    def judge(self, direction: str, name: str, values: Any) -> None:
        """Keep a module's values if they are the first bad ones of their direction."""
        for value in tree_leaves(values):
            is_number = isinstance(value, Tensor) and value.is_floating_point()
            if direction in self.findings or not is_number or value.detach().isfinite().all():
                continue
            is_of_images = value.dim() > 0 and len(value) == self.num
            images = _bad_images(value) if is_of_images else None
            self.findings[direction] = Finding(name, direction, images)
