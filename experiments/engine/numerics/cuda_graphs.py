"""Compile a network, or capture its kernels in a CUDA graph that one launch replays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.engine.numerics.precision import read_tf32_flags

# A function of x (N,C,H,W) and further tensors. Addresses and values may differ between calls.
Step = Callable[..., Tensor]
# Turns a step into a function that computes the same, for example by replaying a graph.
Launch = Callable[[Step], Step]


def require_gpu(device: torch.device) -> None:
    """Raise ValueError unless the device can run CUDA graphs."""
    if device.type != "cuda":
        raise ValueError("CUDA graphs need a GPU; leave graphs out")


def run_eagerly(step: Step) -> Step:
    """Return the step unchanged: the `Launch` that captures nothing."""
    return step


def accelerate(model: nn.Module, compiled: bool, graphs: bool = False) -> nn.Module:
    """Compile a network for inference, capture it in CUDA graphs, or both.

    The network is changed in place and returned. With `graphs`, each call overwrites the output
    of the call before (see `CudaGraph`), so samplers capture whole steps instead.

    Raises:
        ValueError: graphs are requested and the network is not on a GPU.
    """
    if graphs:
        require_gpu(next(model.parameters()).device)
    if compiled:
        model.forward = torch.compile(model.forward)
    if graphs:
        model.forward = CudaGraph(torch.no_grad()(model.forward))
    return model


class Capture(NamedTuple):
    """One captured graph."""

    # Runs the captured kernels.
    replay: Callable[[], None]
    # The tensors that a replay reads.
    inputs: tuple[Tensor, ...]
    # The tensor that a replay overwrites.
    output: Tensor


class CudaGraph:
    """Call a function on a GPU by replaying a graph, captured once for each shape and numeric mode.

    The function's Python code runs only during a capture. The output, and everything else that
    the function writes, such as gradients on parameters, stays in the graph's own memory. The
    next call overwrites it.
    """

    # How often any graph was replayed in this process; shows whether graphs were really used.
    replayed = 0

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.captures: dict[tuple[Any, ...], Capture] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        # A graph fits one set of shapes and dtypes, and one numeric mode.
        shapes = tuple((tuple(x.shape), x.dtype) for x in inputs)
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        key = (*shapes, *autocast, *read_tf32_flags().values())
        if key not in self.captures:
            with without_weight_cache():
                self.captures[key] = self._capture(tuple(x.clone() for x in inputs))

        # A replay reads fixed addresses, so the inputs are copied there first.
        CudaGraph.replayed += 1
        capture = self.captures[key]
        for target, x in zip(capture.inputs, inputs, strict=True):
            target.copy_(x)
        capture.replay()
        return capture.output

    def _capture(self, inputs: tuple[Tensor, ...]) -> Capture:
        """Run the function a few times aside, then once more under capture."""
        # An old graph must not be freed while a new one is captured, so collect garbage first.
        gc.collect()

        # Libraries initialise themselves in the first calls, which a graph cannot hold.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(aside)

        # "thread_local" lets other threads pin batches and noise, which a global capture forbids.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.function(*inputs)
        return Capture(graph.replay, inputs, output)


def without_weight_cache() -> AbstractContextManager[None]:
    """Continue the current autocast without its cache of bf16 weights.

    Cached weights are freed when the block ends, but a captured graph outlives the block.
    """
    return torch.autocast(
        "cuda",
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


class SharedGraph:
    """A `Launch` that captures the first step it is given and replays it for every later step.

    All steps must do the same with the tensors that they receive.
    """

    def __init__(self) -> None:
        self.graph: CudaGraph | None = None

    def __call__(self, step: Step) -> CudaGraph:
        if self.graph is None:
            self.graph = CudaGraph(step)
        return self.graph
