"""A GPU without a card: fake tensors of device `cuda`, which have shapes and types but no values.

`fake_cuda` makes what runs inside meet such tensors. `Watch` refuses every operator that would wait
for the GPU, or that meets a tensor elsewhere. PyTorch's engine of gradients needs a driver, so
`walk` takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA = torch.device("cuda")
Module = TypeVar("Module", bound=nn.Module)
# Tags of operators whose result or size the host has to read.
READ_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What multiplies matrices or convolves; gradients included.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")


class OnCuda(torch.Generator):
    """A generator that says it is on a GPU; fake tensors ask it for nothing else."""

    device = CUDA


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Call the fused attention of a GPU; without a driver PyTorch would write attention out."""
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(low) for x in (q, k, v))
    bias = None if attn_mask is None else attn_mask.to(q.dtype)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Make all tensors of the block fake, and let autocast and gradients work without a driver."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        patch.setattr(Tensor, "backward", lambda loss: walk(loss))
        patch.setattr(torch.autograd, "grad", lambda loss, x: (walk(loss, [x])[0],))
        yield mode


def on_cuda(x: Tensor) -> Tensor:
    """Return the fake tensor on a GPU that stands for a tensor; call it inside `fake_cuda`."""
    fake = x.detach().to(CUDA)
    return fake.requires_grad_(x.requires_grad)


def move(model: Module) -> Module:
    """Move a real network to the fake GPU in place, by what `to` calls of every module."""
    model._apply(on_cuda)
    return model


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function on real tensors, also inside `fake_cuda`: before the first step."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


# ---- Gradients


def walk(root: Tensor, wanted: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Run a backward pass node by node, as PyTorch's engine does, without its streams.

    Args:
        root: 0-d.
        wanted: leaves whose gradients are returned; None: gradients are added to all leaves.
    """
    incoming: dict[Any, dict[int, Tensor]] = {root.grad_fn: {root.output_nr: torch.ones_like(root)}}
    returned: dict[int, Tensor] = {}
    for node in _sort(root.grad_fn):
        arrived = incoming.pop(node, {})
        if not arrived:
            continue
        if hasattr(node, "variable") and wanted is not None:
            returned[id(node.variable)] = arrived[0]
            continue

        places = range(len(node._input_metadata))
        with torch.no_grad():
            gradients = _run(node, [arrived.get(place) for place in places])
        for (following, place), gradient in zip(node.next_functions, gradients, strict=True):
            if following is None or gradient is None:
                continue
            gradient = _fit(gradient, following._input_metadata[place])
            received = incoming.setdefault(following, {})
            received[place] = received[place] + gradient if place in received else gradient
    return [returned[id(x)] for x in wanted or ()]


def _run(node: Any, arrived: list[Tensor | None]) -> list[Tensor | None]:
    """Return a node's gradients, one for each of the nodes that follow."""
    if callable(node):
        gradients = node(*arrived)
        return list(gradients) if isinstance(gradients, tuple) else [gradients]

    # A function in Python also returns None for each argument that is no tensor.
    gradients = node.apply(*arrived)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    needed = iter(x for x, needs in zip(gradients, node.needs_input_grad, strict=True) if needs)
    return [None if following is None else next(needed) for following, _ in node.next_functions]


def _sort(root: Any) -> list[Any]:
    """List the nodes of a graph, each before those that it passes gradients to."""
    waiting = Counter[Any]()
    seen = {root}
    stack = [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                waiting[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)

    # Kahn's algorithm: a node is ready once all that reach it are listed.
    ready, ordered = [root], []
    while ready:
        ordered.append(ready.pop())
        for following, _ in ordered[-1].next_functions:
            if following is not None:
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    return ordered


def _fit(gradient: Tensor, like: Any) -> Tensor:
    """Sum and cast a gradient to what the engine requires of it."""
    assert gradient.device.type == like.device.type, f"a gradient is on {gradient.device}"
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    return gradient.to(like.dtype)


# ---- What runs


class Watch(TorchDispatchMode):
    """Refuse what would wait for the GPU, and tensors elsewhere; note the types of products.

    A number of no dimension may be on the CPU, since a launch carries it along, and so may what is
    copied without a stop.
    """

    def __init__(self) -> None:
        super().__init__()
        # Types of the tensors that products read.
        self.products: set[torch.dtype] = set()
        self.num_operators = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What only asks a tensor about itself moves nothing.
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        _refuse_read_back(func, args, kwargs, inputs)
        out = func(*args, **kwargs)
        outputs = _tensors(out)

        # Everything is on the GPU, and stays there; a list of numbers may be sent without a stop.
        sends = kwargs.get("non_blocking") or func is aten.lift_fresh.default
        for x in [*inputs, *outputs]:
            where = x.device.type if isinstance(x, FakeTensor) else f"{x.device} before the step"
            known = where == "cuda" or not x.ndim or sends
            assert known, f"{func}: {tuple(x.shape)} is on {where}"
        if func in (aten._to_copy.default, aten.copy_.default) and not kwargs.get("non_blocking"):
            places = {x.device.type for x in [*inputs, *outputs]}
            assert places == {"cuda"}, f"{func} copies between the host and the GPU"

        self.num_operators += 1
        if func.overloadpacket.__name__.lstrip("_").startswith(PRODUCTS):
            # The first arguments are the factors; a fused attention also keeps its statistics.
            self.products |= {x.dtype for x in inputs[:2] if x.ndim > 1}
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _refuse_read_back(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]
) -> None:
    """Raise AssertionError for an operator whose result the host reads or whose size it needs."""
    if not READ_BACK & set(func.tags):
        return
    # Indices that are numbers have a known count; masks have not.
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if not any(x.dtype in (torch.bool, torch.uint8) for x in masks):
            return
    raise AssertionError(f"{func} waits for the GPU")
