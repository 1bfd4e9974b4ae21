"""Count how often networks are evaluated in sampling, and launch steps as CUDA graphs."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.diffusion.cascade import System
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.objectives import WithShare, has_gates
from experiments.engine.numerics.cuda_graphs import SharedGraph, Step, without_weight_cache
from experiments.engine.runtime.preemption import Preempted, requested_stop

MAX_STEPS_UNDER_WAY = 2  # steps that are queued on a GPU before it has done them


class CountingModel:
    """A network, or a system of networks, that counts the images it is given.

    Divided by the number of sampled images, the count is the evaluations per image (NFE). Of a
    system, base model and upsampler count; the gradients of its classifier do not.

    A chunk of images takes many evaluations, so each evaluation raises `Preempted` if the job is
    asked to stop.
    """

    def __init__(self, model: Model | System, capture_steps: bool = False) -> None:
        """Wrap a network.

        Args:
            model: the network or system.
            capture_steps: whether the sampler's steps are launched as CUDA graphs. The steps of all
                batches must do the same operations. Graphs are kept until `release_graphs`.
        """
        self.num_given = 0  # images given to this network, without the upsampler's
        self.classifier = None
        self.upsampler: CountingModel | None = None
        if isinstance(model, System):
            self.model: Model = model.base
            self.classifier = model.classifier
            if model.upsampler is not None:
                self.upsampler = CountingModel(model.upsampler)
        else:
            self.model = model

        # A replay would not hear of the shares.
        self.graphs = SharedGraph() if capture_steps and not has_gates(self.model) else None
        # The share of its gated work that a network with gates did for each image and step.
        self.with_share: WithShare | None = None
        if isinstance(self.model, nn.Module) and has_gates(self.model):
            self.with_share = WithShare(self.model)
        self.shares: list[Tensor] = []
        # Images that one captured step gives to the network, by the shape of x.
        self.given_by_step: dict[torch.Size, int] = {}
        self.under_way: deque[torch.cuda.Event] = deque()

    @property
    def evaluated(self) -> int:
        """Images given to the network and to its upsampler so far."""
        above = self.upsampler.num_given if self.upsampler else 0
        return self.num_given + above

    def count(self, num: int) -> None:
        """Count images that are given to the network; `Preempted` if the job is asked to stop."""
        _raise_if_asked_to_stop()
        self.num_given += num

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N,C,H,W), (N,), (N,) -> the network's output."""
        self.count(len(x))
        if self.with_share is None:
            return self.model(x, t, y)
        prediction, share = self.with_share(x, t, y)
        self.shares.append(share)
        return prediction

    def once_per_caption(self, y: Tensor) -> AbstractContextManager[None]:
        """Do the work on the text of captions (N,) once for all calls inside.

        A captured step holds that work instead: its graph serves other captions later.
        """
        return nullcontext() if self.graphs else backbones.once_per_caption(self.model, y)

    def launch(self, step: Step) -> Step:
        """Return what a sampler calls in place of its step: the step itself or a graph of it.

        The first step of a shape runs eagerly and is counted. A replay runs no Python, so it counts
        what the first step did.
        """
        if self.graphs is None:
            return step
        graph = self.graphs(step)

        def launched(x: Tensor, *rest: Tensor) -> Tensor:
            _raise_if_asked_to_stop()
            before = self.num_given
            if x.shape not in self.given_by_step:
                with without_weight_cache():
                    out = step(x, *rest)
                self.given_by_step[x.shape] = self.num_given - before
            else:
                out = graph(x, *rest)
                self.num_given = before + self.given_by_step[x.shape]
            self._limit_steps_under_way(x.device)
            return out

        return launched

    def _limit_steps_under_way(self, device: torch.device) -> None:
        """Wait until few steps are queued on a GPU.

        A request to stop would have to wait for all of them, and their noise takes memory.
        """
        if device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        self.under_way.append(event)
        event.record()
        if len(self.under_way) > MAX_STEPS_UNDER_WAY:
            self.under_way.popleft().synchronize()

    def release_graphs(self) -> None:
        """Free the graphs and their memory; their steps hold this object in turn."""
        self.graphs = None


def _raise_if_asked_to_stop() -> None:
    request = requested_stop()
    if request:
        raise Preempted(request)
