"""Watch the token mixers of a running network: what enters each, and with which weights it mixes.

N images, C channels, S tokens of a layer's sequence, T = H W tokens of its grid in row-major order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analysis.probes.implied import Weights
from backbones.kernels import observing, use

Grid = tuple[int, int]

# Kernels that no reader needs. `attention` is observed as torch's own function instead. The others
# mix no tokens, or are convolutions, whose weights are known.
IGNORED_KERNELS = (
    "attention",
    "channel_attention",
    "unpack",
    "linear",
    "pointwise",
    "adaln",
    "adaln_pointwise_gelu",
    "addcmul",
    "conv3x3",
    "depthwise",
    "depthwise_gelu",
    "gelu",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pointwise_gated",
    "pointwise_gelu",
    "pool",
    "sample_depthwise",
    "scale",
)


@dataclass(frozen=True)
class Operation:
    """An operation that was observed inside a layer's call."""

    # "attention", "softmax" or the name of a kernel.
    name: str
    # (q, k, bias, scale) of an attention, the output of a softmax, or the kernel's own arguments.
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """A token mixer, and how its weights are read."""

    # As the network names the module.
    name: str
    # Its first input is x (N, C, H, W), or (N, S, C) if `place` is given.
    module: nn.Module
    # Makes weights from the observed operations, x and the tokens' places. None: the weights are
    # not known, and only the mixer's gradient is measured.
    read: Callable[[list[Operation], Tensor, Tensor], Weights] | None
    # None: the shape of the input.
    grid: Grid | None = None
    # Position of the grid's tokens in the sequence, (T,). None: the sequence is the grid.
    place: Tensor | None = None
    # The mixer alone, without its residual connection: f(x, *other inputs). None: the mixer cannot
    # be written as a function of one input.
    mix: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass."""

    layer: Layer
    # Distinguishes the calls of a layer that is shared.
    name: str
    # Counts the calls of all watched layers.
    index: int
    grid: Grid
    place: Tensor
    inputs: tuple[Any, ...]
    # None where the layer has no reader.
    weights: Weights | None


class SoftmaxObserver(TorchFunctionMode):
    """Reports every softmax and every fused attention that torch computes."""

    def __init__(self, observe: Callable[..., None]) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        # Attention and softmax are the two ways in which a network weighs its tokens.
        if func is F.scaled_dot_product_attention:
            q = kwargs["query"] if "query" in kwargs else args[0]
            k = kwargs["key"] if "key" in kwargs else args[1]
            bias = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.observe("attention", q, k, bias, kwargs.get("scale"))
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            self.observe("softmax", out)

        return out


class _Watcher:
    """Collects the operations of the layer that runs, and shows each finished call to `see`."""

    def __init__(self, see: Callable[[Call], None]) -> None:
        self.see = see
        self.busy = False  # while `see` computes, which is not watched
        self.operations: list[Operation] | None = None  # None: no watched layer runs
        self.calls: Counter[str] = Counter()

    def observe(self, name: str, *args: Any) -> None:
        if self.operations is not None:
            self.operations.append(Operation(name, args))

    def observe_kernel(self, name: str, *args: Any) -> None:
        if name not in IGNORED_KERNELS:
            self.observe(name, *args)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.operations = None if self.busy else []

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        *,
        layer: Layer,
    ) -> None:
        if self.busy:
            return

        operations = self.operations
        assert operations is not None, layer.name
        self.operations = None

        # While `see` computes, `busy` keeps its operations from being recorded.
        self.busy = True
        try:
            self.see(self._call(layer, args or (kwargs["hidden_states"],), operations))
        finally:
            self.busy = False

    def _call(self, layer: Layer, inputs: tuple[Any, ...], operations: list[Operation]) -> Call:
        # Where the tokens of this call lie.
        x = inputs[0]
        grid = layer.grid or _grid_of(x)
        place = torch.arange(num_tokens(grid)) if layer.place is None else layer.place
        place = place.to(x.device)
        weights = layer.read(operations, x, place) if layer.read else None

        # The second and later calls of a shared layer carry their number in their name.
        index = self.calls.total()
        self.calls[layer.name] += 1
        turn = self.calls[layer.name]
        name = layer.name if turn == 1 else f"{layer.name} call {turn}"
        return Call(layer, name, index, grid, place, inputs, weights)


@contextmanager
def watching(layers: list[Layer], see: Callable[[Call], None]) -> Iterator[None]:
    """Show `see` every call of the layers once it has run. What `see` computes is not watched."""
    watcher = _Watcher(see)
    with ExitStack() as stack:
        # The hooks go when the block ends, even after an error.
        for layer in layers:
            after = partial(watcher.after, layer=layer)
            hooks = (
                layer.module.register_forward_pre_hook(watcher.before, with_kwargs=True),
                layer.module.register_forward_hook(after, with_kwargs=True),
            )
            for hook in hooks:
                stack.callback(hook.remove)

        # Attention runs as sdpa, where the observer sees its q, k and bias.
        stack.enter_context(use(attention="sdpa"))
        stack.enter_context(observing(watcher.observe_kernel))
        stack.enter_context(SoftmaxObserver(watcher.observe))
        yield


def num_tokens(grid: Grid) -> int:
    """Return the number of tokens of a grid."""
    return grid[0] * grid[1]


def _grid_of(x: Tensor) -> Grid:
    """Return the grid of x (N, C, H, W), or of the tokens of a square, (N, T, C)."""
    if x.ndim == 4:
        height, width = x.shape[-2:]
        return height, width
    side = round(x.shape[1] ** 0.5)
    return side, side
