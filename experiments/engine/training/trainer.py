"""The trainer: one loop for every backbone, resumable at any step with the same weights, on a CPU to the last bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import backbones
from experiments.engine.data.sets import ImageSet, iterate_batches
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.numerics.cuda_graphs import CudaGraph, require_gpu
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.runtime.group import ALONE, Group, average_gradients
from experiments.engine.specs.spec import Backbone, Recipe, Train
from experiments.engine.training import checkpoint


def build(spec: Backbone, seed: int, device: torch.device) -> nn.Module:
    """The declared network, initialised from the seed, its activations channels-last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("init", seed))
        model = backbones.build(spec.name, **spec.options)
    return model.to(device=device, memory_format=torch.channels_last)


def lr_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then constant, or linear or cosine to `lr_min`."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.decay == "cosine":
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * 0.5 * (
            1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup))
        )
    if recipe.decay == "linear":
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * (recipe.steps - step) / (
            recipe.steps - recipe.warmup
        )
    if recipe.decay != "constant":
        raise ValueError(f"unknown decay {recipe.decay!r}; known: constant, linear, cosine")
    return recipe.lr


class Trainer:
    """Model, EMA and optimiser of a run, and the step it has reached; each process of a group has its own, all alike; `model`: as `build` makes it, where at hand."""

    def __init__(
        self,
        spec: Train,
        device: torch.device,
        micro_batch: int | None = None,
        group: Group = ALONE,
        shard_optimizer: bool = False,
        compiled: bool = False,
        graphs: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.spec, self.device, self.group = spec, device, group
        self.mine = group.shard(spec.recipe.batch)
        self.micro_batch = micro_batch or spec.recipe.batch
        self.model = model or build(spec.backbone, spec.seed, device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        recipe = spec.recipe
        self.forward: nn.Module = self.model
        if group.world_size > 1:
            self.forward = average_gradients(
                self.model,
                static=not compiled and self.micro_batch >= self.mine.stop - self.mine.start,
            )
        self.without_exchange = self.forward.no_sync if group.world_size > 1 else nullcontext
        if compiled:
            self.forward = torch.compile(self.forward)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        options = dict(
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.sharded = shard_optimizer and group.world_size > 1
        self.optimizer = (
            ZeroRedundancyOptimizer(trainable, torch.optim.AdamW, **options)
            if self.sharded
            else torch.optim.AdamW(trainable, **options)
        )
        self.diffusion = build_diffusion(spec.diffusion).to(device)
        self.passes: Callable[..., Tensor] = self._passes
        if graphs:
            require_gpu(device)
            if group.world_size == 1:  # the exchange between processes stays outside of graphs
                self.passes = CudaGraph(self._passes)
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Everything a run goes on from, the same for every number of processes; {} on all but the first, and all must call."""
        if self.sharded:
            self.optimizer.consolidate_state_dict(to=0)
        if not self.group.first:
            return {}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = step

    def begin(self, trained: nn.Module) -> None:
        """Start from a trained network, which may be for another size of image where this one has a `resized`."""
        weights = trained.state_dict()
        weights = self.model.resized(weights) if hasattr(self.model, "resized") else weights
        for network in (self.model, self.ema):
            network.load_state_dict(weights)

    def steps(self, images: ImageSet) -> Iterator[Tensor]:
        """Train from the step reached to the last, yielding each step's loss (0-d, on the device): this rank's share of the sum."""
        recipe = self.spec.recipe
        for x0, y in iterate_batches(
            images,
            recipe.batch,
            self.spec.seed,
            range(self.step, recipe.steps),
            self.device,
            self.mine,
        ):
            loss = self._update(x0, y, images.flip)
            self.step += 1
            yield loss

    def _update(self, x0: Tensor, y: Tensor, flip: bool) -> Tensor:
        """One optimiser step on this rank's part of a global batch, whose noise depends on (seed, step) and the place in it only."""
        recipe, n, mine = self.spec.recipe, self.spec.recipe.batch, self.mine
        noise = generator_at("train", self.spec.seed, self.step, device=self.device)
        t = self.diffusion.draw_times(n, noise)[mine]
        eps = torch.randn((n, *x0.shape[1:]), generator=noise, device=self.device)[mine]
        dropped = torch.rand(n, generator=noise, device=self.device)[mine] < recipe.label_dropout
        flipped = torch.rand(n, generator=noise, device=self.device)[mine] < 0.5
        kept = (
            [increment_weights(self.model, recipe.drop_path, n, noise)[mine]]
            if recipe.drop_path
            else []
        )
        y = torch.where(dropped, self.spec.data.num_classes, y)
        if flip:
            x0 = torch.where(flipped[:, None, None, None], x0.flip(-1), x0)
        loss = self.passes(x0, y, t, eps, *kept).clone()  # out of a graph's memory
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(recipe, self.step)
        if recipe.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.optimizer.step()
        update_ema(self.ema, self.model, recipe.ema)
        return loss

    def _passes(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor, *kept: Tensor) -> Tensor:
        """Forward and backward over the batch, cut into micro-batches: leaves new gradients on the parameters and returns the loss.

        What a graph holds: the optimiser's few launches are made while it runs. Nothing else touches `.grad`, where a replay writes.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(x0), self.micro_batch):
            at = slice(start, start + self.micro_batch)
            exchange = nullcontext() if at.stop >= len(x0) else self.without_exchange()
            with exchange, precision(self.spec.recipe.precision, self.device):
                forward = partial(self.forward, kept=kept[0][at]) if kept else self.forward
                loss = (
                    self.diffusion.losses(forward, x0[at], y[at], t[at], eps[at])["loss"].sum()
                    / self.spec.recipe.batch
                )
                with torch.autocast(
                    self.device.type, enabled=False
                ):  # each op's backward runs in its forward's type
                    (
                        loss * self.group.world_size
                    ).backward()  # the exchange takes the mean over ranks, and this is a sum
            total += loss.detach()
        return total


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model for every parameter; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)


def load_ema(spec: Train, folder: Path, device: torch.device) -> nn.Module:
    """The finished run's EMA network in eval mode; ValueError if the run has not finished."""
    found = checkpoint.load_newest(folder / "checkpoints", device)
    if found is None or found[0] < spec.recipe.steps:
        raise ValueError(
            f"run {folder.name} has no finished checkpoint; if it was removed, remove records/train/{folder.name}-*.json too and train again"
        )
    model = build(spec.backbone, spec.seed, device)
    model.load_state_dict(found[1]["ema"])
    return model.eval()


# Stochastic depth: Huang et al. (arXiv:1603.09382), for networks that take their increments' weights from outside.
def increment_weights(model: nn.Module, largest: float, num: int, noise: torch.Generator) -> Tensor:
    """(num, K): 0 for an increment that is dropped, else what makes up for those that are. ValueError for a network without increments."""
    if not hasattr(model, "drop_rates"):
        raise ValueError(
            f"{type(model).__name__} has no stochastic depth: drop_path of its recipe must be 0"
        )
    rates = torch.tensor(model.drop_rates(largest)).to(noise.device, non_blocking=True)
    return (torch.rand((num, len(rates)), generator=noise, device=noise.device) >= rates) / (
        1 - rates
    )
