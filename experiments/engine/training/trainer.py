"""The trainer: one loop for every backbone.

It can stop after any step and resume with the same weights, on a CPU to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.objective import NextScale
from experiments.engine.data.quantise import mirror
from experiments.engine.data.sets import AnySet, iterate_batches
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.objectives import Gated, has_gates
from experiments.engine.numerics.cuda_graphs import CudaGraph, require_gpu
from experiments.engine.numerics.parts import gather_state, make_whole, part_state
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.numerics.recompute import find_blocks, recompute_blocks
from experiments.engine.runtime.context import Resources
from experiments.engine.runtime.group import ALONE, Group, average_gradients
from experiments.engine.specs.spec import Train
from experiments.engine.specs.weights import Weights
from experiments.engine.texts.tables import give_captions
from experiments.engine.training.alignment import build_aligner
from experiments.engine.training.averages import PowerAverages
from experiments.engine.training.networks import build, build_objective
from experiments.engine.training.networks import load_ema as load_ema
from experiments.engine.training.optimiser import (
    MovingAverage,
    build_optimizer,
    load_optimizer,
    lr_at,
)
from experiments.engine.training.sharded.network import shard_network
from experiments.engine.training.stochastic_depth import increment_weights
from experiments.engine.training.watch.blocks import Look, Watch
from experiments.engine.training.watch.freeze import Freeze


class Trainer:
    """Model, EMA and optimiser of a run, and the step that it has reached.

    Each process of a group has a trainer of its own. All hold the same weights, or each its part.
    """

    def __init__(
        self,
        spec: Train,
        resources: Resources | None = None,
        group: Group = ALONE,
        model: nn.Module | None = None,
        teacher: nn.Module | None = None,
        tokenizer: nn.Module | None = None,
    ) -> None:
        """Prepare a training from its first step.

        Args:
            spec: What is trained.
            resources: Device, micro-batch, and how the passes are launched.
            group: The processes that share every batch.
            model: The network, if `build` has made it already.
            teacher: The trained network that a distillation declares.
            tokenizer: The trained tokenizer that the training declares.

        Raises:
            ValueError: A distillation lacks its teacher, or the network does not follow from it.
                The network predicts no tokens or others than the declared ones.
        """
        resources = resources or Resources()
        self.spec = spec
        self.group = group
        self.device = torch.device(resources.device)
        self.step = 0
        # What the network took from a file that it started from; empty if there is none.
        self.start: dict[str, Any] = {}
        # Whether processes share every weight. A process alone holds all of them.
        self.is_parted = resources.fully_shard and group.world_size > 1
        # The part of each global batch that this process computes.
        self.shard = group.shard(spec.recipe.batch)
        self.micro_batch = resources.micro_batch or spec.recipe.batch

        # Networks, optimiser and objective.
        self.model = self._build() if model is None else model
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.objective = build_objective(spec, teacher, tokenizer, self.device)
        if resources.recompute:  # the average is a copy from before, without a backward pass
            recompute_blocks(self.model)
        # What the losses call: the network, or what gives more of it than its prediction.
        self.entry = entry = self.objective.training_entry(self.model)
        self.aligner = build_aligner(spec, self.model, entry, self.objective)
        if self.aligner:
            self.entry = entry = self.aligner.aligned
        if self.is_parted:
            self._shard(resources.compile)
        self.moving_average = MovingAverage(self.ema, self.model, spec.recipe.ema)
        self.averages = PowerAverages(self.model) if spec.recipe.power_snapshots else None
        beside = self.aligner.aligned.projector.parameters() if self.aligner else ()
        several = group.world_size > 1
        self.shards_state = resources.shard_optimizer and several and not self.is_parted
        self.optimizer = build_optimizer(self.model, spec.recipe, self.shards_state, beside)

        # What is kept and noted for the case that the training diverges.
        self.freeze = Freeze(self.optimizer, group, self.device)
        self.watch = Watch(self.model)
        self.watch_every = resources.watch_every
        self.looks: list[Look] = []

        # How the network runs: averaged over processes, compiled, as a CUDA graph.
        # The argument under which the network is given what is drawn for it beside times and noise.
        self.extra = "noise" if isinstance(self.objective, Gated) else "kept"
        self.forward: nn.Module = entry
        self.skip_exchange: Callable[[], AbstractContextManager[Any]] = nullcontext
        if group.world_size > 1 and not self.is_parted:
            share = self.shard.stop - self.shard.start
            accumulates = self.micro_batch < share
            averaging = average_gradients(entry, static=not resources.compile and not accumulates)
            self.forward = averaging
            self.skip_exchange = averaging.no_sync
        if resources.compile and not self.is_parted:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        self.forward_backward: Callable[..., Tensor] = self._forward_backward
        if resources.graphs:
            require_gpu(self.device)
            if isinstance(self.objective, Gated):
                raise ValueError(
                    "the loss of gates changes with the step, which no CUDA graph follows: leave "
                    "out --graphs"
                )
            if group.world_size == 1:  # no graph can hold the exchange between processes
                self.forward_backward = CudaGraph(self._forward_backward)

    def _build(self) -> nn.Module:
        """Build the network of the first step; what is to be shared is built in host memory."""
        spec = self.spec
        device = torch.device("cpu") if self.is_parted else self.device
        model = build(spec.backbone, spec.seed, device, spec.recipe.initial)
        give_captions(model, spec.data)
        return model

    def _shard(self, compiles: bool) -> None:
        """Keep of network, average and what is trained beside them this process's part alone."""
        # No graph holds the exchange between processes, so blocks are compiled one by one.
        for block in find_blocks(self.model) if compiles else []:
            block.forward = torch.compile(block.forward)
        shard_network(self.model, self.device, self.entry)
        shard_network(self.ema, self.device)
        if self.aligner:
            self.aligner.encoder.to(self.device)

    def state(self) -> dict[str, Any]:
        """Return everything that a run resumes from, the same for any number of processes.

        All processes must call this. All but rank 0 get {}.
        """
        if self.shards_state:
            cast(Any, self.optimizer).consolidate_state_dict(to=0)
        if self.is_parted:
            return gather_state(self.own_state(), self.group.first)
        return self.own_state() if self.group.first else {}

    def own_state(self) -> dict[str, Any]:
        """Return everything that a run resumes from, of shared tensors this process's parts."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.aligner:
            state["projector"] = self.aligner.aligned.projector.state_dict()
        state |= {"power": self.averages.state()} if self.averages else {}
        return state | ({"start": self.start} if self.start else {})

    def parted_like(self) -> dict[str, Any]:
        """Return tensors in whose places a checkpoint's are read as parts; {} if none are."""
        if not self.is_parted:
            return {}
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {place: {"exp_avg": p, "exp_avg_sq": p} for place, p in enumerate(weights)}
        return self.own_state() | {"optimizer": {"state": moments}}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Resume from the state that a run had after `step` steps, as `parted_like` reads it."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.averages:
            self.averages.restore(state["power"])
        self.start = state.get("start", {})
        if self.aligner:
            self.aligner.aligned.projector.load_state_dict(state["projector"])
        self.step = step

    def start_from(self, trained: nn.Module) -> None:
        """Start from the weights of a trained network, which may be for another image size.

        A network with gates starts from a dense one.
        """
        model = self._whole_model()
        weights: Any = trained.state_dict()
        load_dense: Any = getattr(model, "load_dense", None)
        if load_dense and not has_gates(trained):
            load_dense(weights)
        else:
            weights = backbones.fit(model, weights, backbones.Labels.SAME, "the first network")
            model.load_state_dict(weights)
        self._begin_as(model)

    def start_from_file(self, weights: Weights, path: Path) -> None:
        """Start from the weights of a file, and remember what came from it.

        Raises:
            ValueError: They are of another network, or of other classes without a word on these.
        """
        notes: list[str] = []
        key = None if weights.key == Weights.key else weights.key
        labels = backbones.Labels(weights.labels)
        model = self._whole_model()
        taken = backbones.load_fitted(model, path, key, labels, warn=notes.append)
        self._begin_as(model)
        declared = {"sha256": weights.sha256, "labels": weights.labels, "warnings": notes}
        self.start = declared | taken.describe()

    def inherit_from(self, teacher: nn.Module) -> None:
        """Start from the parts of a teacher that the network keeps."""
        model = self._whole_model()
        model.load_state_dict(backbones.inherit_weights(model, teacher))
        self._begin_as(model)

    def _whole_model(self) -> nn.Module:
        """Return the network, of which no step was made; if it is shared, another one like it."""
        return self._build() if self.is_parted else self.model

    def _begin_as(self, model: nn.Module) -> None:
        """Give the network and its average the weights of the first step."""
        weights = part_state(model.state_dict(), self.model.state_dict())
        if self.is_parted:
            self.model.load_state_dict(weights)
        self.ema.load_state_dict(weights)

    def steps(self, images: AnySet) -> Iterator[Tensor]:
        """Train from the step reached to the last step.

        Yields:
            After each step, this rank's share of the loss (0-d, on the device). The shares of all
            ranks add up to the mean over the batch.
        """
        recipe = self.spec.recipe
        remaining = range(self.step, recipe.steps)
        for x0, y in iterate_batches(
            images, recipe.batch, self.spec.seed, remaining, self.device, self.shard
        ):
            loss = self._update(x0, y, images.flip)
            self.step += 1
            yield loss

    def _update(self, x0: Tensor, y: Tensor, flip: bool) -> Tensor:
        """Make one optimiser step on this rank's shard of a global batch."""
        recipe = self.spec.recipe
        inputs = self.draw(self.step, x0, y, flip, self.shard)

        # A graph overwrites its loss at the next step, so the loss is copied.
        loss = self.forward_backward(*inputs).clone()
        norm = self._look(inputs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(recipe, self.step)
        if recipe.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self.entry.parameters(), recipe.grad_clip)
            norm = make_whole(norm)
        self.freeze.judge(self.step, loss, norm)
        self.optimizer.step()
        self.moving_average.update()
        if self.averages:
            self.averages.update(self.step + 1)
        return loss

    def _look(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Look at the network's parts if that is due, and return the gradient's norm then.

        Values are those of this rank's images; gradients are those of the whole batch.
        """
        if not self.watch_every or (self.step + 1) % self.watch_every:
            return None

        def run() -> None:
            for start in range(0, len(inputs[0]), self.micro_batch):
                part = slice(start, start + self.micro_batch)
                with torch.no_grad(), precision(self.spec.recipe.precision, self.device):
                    self.losses(self.entry, *(value[part] for value in inputs))
            # Only a backward pass puts away what is no block.
            if self.is_parted:
                cast(Any, self.entry).reshard()

        self.looks.append(self.watch.look(self.step + 1, run))
        return self.looks[-1].norm

    def draw(
        self, step: int, x0: Tensor, y: Tensor, flip: bool, shard: slice
    ) -> tuple[Tensor, ...]:
        """Draw what a step adds to a shard of a global batch: `_forward_backward` takes all of it.

        The noise depends only on the seed, the step and a sample's place in the global batch. So
        every rank draws the noise of the whole batch and keeps its shard.
        """
        recipe = self.spec.recipe
        n = recipe.batch
        noise = generator_at("train", self.spec.seed, step, device=self.device)

        # The order of these draws is part of every recorded number.
        drawn: list[Tensor] = []
        if not isinstance(self.objective, NextScale):
            eps_shape = (n, *x0.shape[1:])
            drawn.append(self.objective.draw_times(n, noise)[shard])
            drawn.append(torch.randn(eps_shape, generator=noise, device=self.device)[shard])
        label_draws = torch.rand(n, generator=noise, device=self.device)[shard]
        flip_draws = torch.rand(n, generator=noise, device=self.device)[shard]
        if recipe.drop_path:
            drawn.append(increment_weights(self.model, recipe.drop_path, n, noise)[shard])
        if isinstance(self.objective, Gated):
            drawn.append(self.objective.draw_gate_noise(self.model, n, noise)[shard])
            self.objective.step = step

        # Drop labels for guidance, and flip images.
        y = torch.where(label_draws < recipe.label_dropout, self.spec.data.num_classes, y)
        if flip:
            mirrored = mirror(x0, self.spec.data.fold)
            x0 = torch.where((flip_draws < 0.5)[:, None, None, None], mirrored, x0)
        return x0, y, *drawn

    def losses(self, model: Model, x0: Tensor, y: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what is logged and what is trained on, of each image that `draw` gave, (N,).

        They differ by the alignment, if the training declares one.
        """
        if isinstance(self.objective, NextScale):
            losses = self.objective.losses(model, x0, y)["loss"]
            return losses, losses

        # Diffusion has times and noises, and what is drawn for the network beside them.
        t, eps, *extra = drawn
        if extra:
            model = partial(model, **{self.extra: extra[0]})
        if self.aligner is None:
            losses = self.objective.losses(model, x0, y, t, eps)["loss"]
            return losses, losses

        # The objective sees the prediction alone.
        projections: list[Tensor] = []

        def predict(*inputs: Tensor, **options: Any) -> Any:
            prediction, projected = model(*inputs, **options)
            projections.append(projected)
            return prediction

        losses = self.objective.losses(predict, x0, y, t, eps)["loss"]
        trained = self.aligner.add(losses, projections[0], x0)
        # What is logged shows an alignment that is no number.
        return losses + 0 * trained.detach(), trained

    def _forward_backward(self, x0: Tensor, y: Tensor, *drawn: Tensor) -> Tensor:
        """Run forward and backward over the shard, cut into micro-batches, and return the loss.

        New gradients lie on the parameters afterwards. A CUDA graph holds this function, so
        nothing else may touch `.grad`, where a replay writes.

        Args:
            x0: (N, C, H, W), images; or (N, L), their tokens.
            y: (N,), labels.
            drawn: Of diffusion, times (N,) and noise (N, C, H, W); then weights of stochastic
                depth or noise of gates, (N, K), if the training has them.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(x0), self.micro_batch):
            part = slice(start, start + self.micro_batch)

            # Only the last micro-batch exchanges gradients.
            is_last = part.stop >= len(x0)
            exchange = nullcontext() if is_last else self.skip_exchange()
            with exchange, precision(self.spec.recipe.precision, self.device):
                shares = (value[part] for value in (x0, y, *drawn))
                logged, trained = self.losses(self.forward, *shares)
                loss = trained.sum() / self.spec.recipe.batch
                # Each op's backward runs in its forward's type. The exchange averages over the
                # ranks, and the loss is a sum over them.
                with torch.autocast(self.device.type, enabled=False):
                    (loss * self.group.world_size).backward()
            total += logged.detach().sum() / self.spec.recipe.batch
        return total
