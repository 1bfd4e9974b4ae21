"""A network compiled, or as one launch: its kernels are recorded into a CUDA graph once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def accelerate(model: nn.Module, compiled: bool, graphs: bool) -> nn.Module:
    """The same network, whose inference is compiled, or one launch a call on a GPU, or both; ValueError for graphs elsewhere."""
    if graphs and next(model.parameters()).device.type != "cuda":
        raise ValueError("CUDA graphs need a GPU; leave graphs out")
    if compiled:
        model.forward = torch.compile(model.forward)
    if graphs:
        model.forward = Captured(model.forward)
    return model


class Captured:
    """Called like the network, on a GPU and without gradients; a graph is captured for every new shape and numeric mode.

    The result lies in the graph's own memory and is overwritten by the next call.
    """

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model = model
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((tuple(part.shape), part.stride(), part.dtype) for part in inputs) + (torch.is_autocast_enabled("cuda"), torch.backends.cuda.matmul.allow_tf32)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs)
        graph, places, out = self.graphs[key]
        for place, part in zip(places, inputs, strict=True):
            place.copy_(part)
        graph.replay()
        return out

    @torch.no_grad()
    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        places = tuple(part.clone() for part in inputs)
        cast = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cast, cache_enabled=False):  # cached weights would not outlive the block
            return self._recorded(places)

    def _recorded(self, places: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in the first calls, which a graph cannot hold
            for _ in range(3):
                self.model(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.model(*places)
        return graph, places, out
