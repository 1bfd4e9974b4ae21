"""A network compiled, or work as one launch: its kernels are recorded into a CUDA graph once and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from experiments.engine.numerics.precision import read_tf32_flags

Step = Callable[
    ..., Tensor
]  # from x (N,C,H,W) and other tensors, which may lie elsewhere and differ in value from call to call
Launch = Callable[[Step], Step]
Recording = tuple[
    Callable[[], None], tuple[Tensor, ...], Tensor
]  # what runs it, where it reads its inputs, where it leaves its result


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError("CUDA graphs need a GPU; leave graphs out")


def run_eagerly(step: Step) -> Step:
    """The step as it is."""
    return step


def accelerate(model: nn.Module, compiled: bool, graphs: bool = False) -> nn.Module:
    """The same network, whose inference is compiled, or one launch a call on a GPU, or both; ValueError for graphs elsewhere.

    What one launch a call returns is overwritten by the next (`CudaGraph`), so samplers record their steps instead.
    """
    if graphs:
        require_gpu(next(model.parameters()).device)
    if compiled:
        model.forward = torch.compile(model.forward)
    if graphs:
        model.forward = CudaGraph(torch.no_grad()(model.forward))
    return model


class CudaGraph:
    """Called like the function, on a GPU; a graph is captured for every new shape and numeric mode.

    Python runs in the capture alone. The result, and whatever else the function leaves, as gradients on parameters, lies in
    the graph's own memory and is overwritten by the next call.
    """

    replayed = 0  # times, by all of them: tells whether graphs are what ran

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        mode = (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            *read_tf32_flags().values(),
        )
        key = *((tuple(part.shape), part.dtype) for part in inputs), *mode
        if key not in self.recordings:
            with without_weight_cache():
                self.recordings[key] = self._record(tuple(part.clone() for part in inputs))
        CudaGraph.replayed += 1
        replay, places, out = self.recordings[key]
        for place, part in zip(places, inputs, strict=True):
            place.copy_(part)
        replay()
        return out

    def _record(self, places: tuple[Tensor, ...]) -> Recording:
        gc.collect()  # graphs that are garbage may not go while another is recorded
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            aside
        ):  # libraries set themselves up in the first calls, which a graph cannot hold
            for _ in range(3):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads go on pinning batches and noise, which a global capture forbids
            out = self.function(*places)
        return graph.replay, places, out


def without_weight_cache() -> AbstractContextManager[None]:
    """Autocast as it is, but for the weights it keeps in bf16, which end with the block, and a recording does not."""
    return torch.autocast(
        "cuda",
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


class SharedGraph:
    """Steps as one launch, of which the first is recorded for all: they do the same with the tensors they are given."""

    def __init__(self) -> None:
        self.captured: CudaGraph | None = None

    def __call__(self, step: Step) -> CudaGraph:
        self.captured = self.captured or CudaGraph(step)
        return self.captured
