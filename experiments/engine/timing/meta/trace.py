"""The operators of a timed task, with their multiply-accumulates and bytes, without running it.

A task runs on the meta device, where tensors have shapes and no values. Operators are those of a
GPU: recurrences and attention count as one fused kernel each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from backbones import kernels
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.records.code import require_own_code
from experiments.engine.reporting.efficiency.roofline import Unit, Work
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing.networks import (
    draw_inputs,
    layout_of,
    list_networks,
    size_backbone,
    training_data,
    training_diffusion,
)
from experiments.engine.timing.operators import (
    CONVOLUTION,
    DEPTHWISE,
    ELEMENTWISE,
    classify,
    collect_tensors,
    count_macs,
    find_distinct,
    is_view,
    storage_of,
)

META = torch.device("meta")
# Operators that give memory a shape and touch none of it.
UNTOUCHED = ("empty", "new_empty")
# Classes of which the outputs are as narrow as the inputs under autocast; other classes that are
# no products put out float32.
KEEPING = (ELEMENTWISE, "copy")
# A backward pass of a recurrence computes its states again, and two gradients.
BACKWARD_MACS = 3
# Bytes a parameter that AdamW (four read, three written) and the average (two, one) move.
UPDATE_BYTES = 40


class Tracer(TorchDispatchMode):
    """Collect every operator that runs, forward and backward, as `Work`.

    Under autocast, products and convolutions read and write bf16, and norms float32. What else is
    made of bf16 alone stays bf16. Which tensors these are is followed from operator to operator.
    """

    def __init__(self, model: nn.Module, trains: bool) -> None:
        """Prepare a trace.

        Args:
            model: its weights are cast once in training, and before the clock starts otherwise.
            trains: whether a backward pass follows.
        """
        super().__init__()
        self.work: Counter[Work] = Counter()
        self._trains = trains
        self._weights = {storage_of(p) for p in model.parameters()}
        self._cast_weights: set[int] = set() if trains else set(self._weights)
        # Storages that autocast holds in bf16.
        self._low: set[int] = set()
        # Of the fused kernel that is running: its arguments and its latest output.
        self._arguments: list[Tensor] = []
        self._latest: list[Tensor] = []
        self._inside = False

    def __enter__(self) -> Tracer:
        self._hooks = (kernels.observing(self._observe), kernels.counting(self._count_fused))
        for hook in self._hooks:
            hook.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in reversed(self._hooks):
            hook.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Autograd has decomposed what only stands for other operators.
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = collect_tensors((*args, *kwargs.values()))
        outputs = collect_tensors([out])
        if self._inside:
            self._latest = outputs
        elif not is_view(func, inputs, outputs):
            self._add(func, args, out, inputs, outputs)
        return out

    def _add(
        self,
        func: Any,
        args: tuple[Any, ...],
        out: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """Add one operator, and the casts that autocast makes before it."""
        class_name = classify(func, args)
        unit = _unit_of(func, class_name)
        is_product = unit is not Unit.PLAIN or class_name == DEPTHWISE

        # Products cast what is not bf16; other operators keep bf16 if nothing else comes in.
        numbers = [x for x in inputs if x.dtype == torch.float32 and x.ndim]
        if is_product:
            self._cast(numbers)
        narrow = is_product or (
            class_name in KEEPING and bool(numbers) and all(map(self._is_low, numbers))
        )
        self._mark(outputs, narrow)
        if func.name().partition("::")[2].startswith(UNTOUCHED):
            return

        # What a product reads is narrow whatever it was before.
        tensors = find_distinct(inputs, outputs)
        wide_bytes = sum(x.numel() * x.element_size() for x in tensors)
        low_bytes = sum(x.numel() * (2 if is_product else self._width(x)) for x in tensors)
        self.work[Work(unit, count_macs(func, args, out), wide_bytes, low_bytes)] += 1

    def _cast(self, tensors: list[Tensor]) -> None:
        """Add the casts of tensors that are float32 so far; a weight is cast once."""
        for x in tensors:
            storage = storage_of(x)
            if storage in self._low or storage in self._cast_weights:
                continue
            if storage in self._weights:
                self._cast_weights.add(storage)
            self.work[Work(Unit.PLAIN, 0, 0, 6 * x.numel())] += 1

    def _mark(self, outputs: list[Tensor], narrow: bool) -> None:
        """Note whether new tensors are bf16; a storage's name may be used again."""
        for storage in map(storage_of, outputs):
            (self._low.add if narrow else self._low.discard)(storage)

    def _is_low(self, x: Tensor) -> bool:
        return storage_of(x) in self._low

    def _width(self, x: Tensor) -> int:
        """Return the bytes of an element under autocast."""
        return 2 if x.dtype == torch.float32 and self._is_low(x) else x.element_size()

    def _observe(self, name: str, *args: Any, **kwargs: Any) -> None:
        if not self._inside:
            self._arguments = collect_tensors((*args, *kwargs.values()))

    @contextmanager
    def _count_fused(self, macs: int, sampling: bool) -> Iterator[None]:
        """Count an op with a closed form as one kernel, and its backward pass as another."""
        arguments, self._inside = self._arguments, True
        yield
        self._inside = False
        outputs = self._latest
        self._mark(outputs, narrow=False)

        # A backward pass reads all again, with a gradient, and writes a gradient of all.
        tensors = find_distinct(arguments, outputs)
        wide_bytes = sum(x.numel() * x.element_size() for x in tensors)
        low_bytes = sum(x.numel() * self._width(x) for x in tensors)
        self.work[Work(Unit.PLAIN, macs, wide_bytes, low_bytes)] += 1
        if self._trains:
            both = Work(Unit.PLAIN, BACKWARD_MACS * macs, 2 * wide_bytes, 2 * low_bytes)
            self.work[both] += 1


def _unit_of(func: Any, class_name: str) -> Unit:
    if "scaled_dot_product" in func.name():
        return Unit.ATTENTION
    return {"product": Unit.LINEAR, CONVOLUTION: Unit.CONVOLUTION}.get(class_name, Unit.PLAIN)


def trace_timing(spec: Timing) -> list[Work]:
    """Trace one run of a timed task, of all networks of its system."""
    work: Counter[Work] = Counter()
    for network in list_networks(spec):
        work += _trace_network(network, spec)
    return [replace(each, calls=calls) for each, calls in work.items()]


def _trace_network(network: Cost, spec: Timing) -> Counter[Work]:
    """Trace a run of one network.

    Raises:
        ValueError: the task is unknown.
    """
    tracers = {"forward": _trace_forward, "training": _trace_training, "sampling": _trace_sampling}
    if spec.what not in tracers:
        raise ValueError(f"unknown task {spec.what!r} to predict; known: {', '.join(tracers)}")

    backbone = size_backbone(network)
    require_own_code(backbone)
    with META:
        model = backbones.build(backbone.name, **backbone.options)
    model = model.to(memory_format=layout_of(spec))  # type: ignore[call-overload]
    with kernels.use(**{"attention": "efficient"} | spec.kernels):
        return tracers[spec.what](model, network, spec)


def _trace_forward(model: nn.Module, network: Cost, spec: Timing) -> Counter[Work]:
    x, t, y = draw_inputs(network, spec, META)
    with torch.no_grad(), Tracer(model.eval(), trains=False) as tracer:
        model(x, t, y)
    return tracer.work


def _trace_sampling(model: nn.Module, network: Cost, spec: Timing) -> Counter[Work]:
    """Trace a loop's network; what a sampler computes beside it is too small to count."""
    x, t, y = draw_inputs(network, replace(spec, batch=2 * spec.batch), META)
    with torch.no_grad(), Tracer(model.eval(), trains=False) as tracer:
        model(x, t, y)
    return Counter({each: spec.num_steps * calls for each, calls in tracer.work.items()})


def _trace_training(model: nn.Module, network: Cost, spec: Timing) -> Counter[Work]:
    """Trace a step of the trainer from the noise to the average."""
    data = training_data(network)
    diffusion = build_diffusion(training_diffusion(network, model)).to(META)
    _, t, y = draw_inputs(network, spec, META)
    x0 = torch.empty(spec.batch, data.channels, data.size, data.size, device=META)
    x0 = x0.to(memory_format=layout_of(spec))
    with Tracer(model.train(), trains=True) as tracer:
        losses = diffusion.losses(model, x0, y, t, torch.empty_like(x0))
        losses["loss"].sum().backward()

    # The update is one fused operator for all parameters; autocast's gradients are cast back.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    update = UPDATE_BYTES * trained
    tracer.work[Work(Unit.PLAIN, 0, update, update + 6 * trained)] += 1
    return tracer.work
