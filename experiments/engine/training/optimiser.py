"""The optimiser of a training: its learning rate, its parameters, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backbones import kernels
from experiments.engine.numerics.parts import own_parts
from experiments.engine.specs.spec import Recipe


def lr_at(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It warms up linearly, then stays constant or falls to `lr_min`, linearly or by a cosine.
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup

    # After the warm-up, the decay decides.
    if recipe.decay == "cosine":
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * 0.5 * (
            1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup))
        )
    if recipe.decay == "linear":
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * (recipe.steps - step) / (
            recipe.steps - recipe.warmup
        )

    # Every other word is an error, never a constant rate.
    if recipe.decay != "constant":
        raise ValueError(f"unknown decay {recipe.decay!r}; known: constant, linear, cosine")
    return recipe.lr


class _AdamW(torch.optim.AdamW):
    """AdamW by `kernels.adamw`, since the loops around PyTorch's own cost small networks more."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        # The first step makes the moments.
        if closure is not None or not all(p in self.state for p in self._weights()):
            return super().step(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in weights]
            moments = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")]
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            rates = kernels.Rates(*numbers)
            grads = [p.grad for p in weights]
            kernels.adamw(weights, grads, *moments, self.found_inf, rates)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def build_optimizer(
    model: nn.Module, recipe: Recipe, is_sharded: bool, beside: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build the fused AdamW of a recipe.

    Args:
        model: its trained parameters are updated.
        recipe: of the training.
        beside: parameters that are trained with it.
        is_sharded: whether each process holds only its part of the optimiser's state.
    """
    trainable = _parameter_groups(model)
    trainable[0]["params"] += beside
    options: dict[str, Any] = dict(
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if is_sharded:
        # Its import takes a second, and a single process needs none of it.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(trainable, _AdamW, **options)
    return _AdamW(trainable, **options)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from an optimiser's state, whose moments may lie in memory in another order.

    The fused update reads parameters and moments side by side, as they lie there.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        place: {name: _laid_like(x, weights[place]) for name, x in values.items()}
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})


@torch.no_grad()
def _laid_like(x: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor as it is, or copied into the layout of a weight of its shape."""
    if x.shape != weight.shape or x.stride() == weight.stride():
        return x
    return torch.empty_like(weight, dtype=x.dtype, device=x.device).copy_(x)


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters; those that a network declares `undecayed` are a group apart.

    `undecayed` is the beginning of the last part of such parameters' names.
    """
    named: dict[str, nn.Parameter] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    beginning: str | None = getattr(model, "undecayed", None)
    if beginning is None:
        return [{"params": list(named.values())}]

    exempt = [p for name, p in named.items() if name.rpartition(".")[2].startswith(beginning)]
    others = [p for name, p in named.items() if not name.rpartition(".")[2].startswith(beginning)]
    return [{"params": others}, {"params": exempt, "weight_decay": 0.0}]


class MovingAverage:
    """The average of a network's weights, which every step moves towards them.

    It lists the tensors once: walking through the modules of a small network takes as long as the
    update. Whoever gives the networks other weights copies them into these.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, decay: float) -> None:
        self._averages, self._weights = list(averaged.parameters()), list(model.parameters())
        self._buffers = list(zip(averaged.buffers(), model.buffers(), strict=True))
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Move every average to decay * average + (1 - decay) * weight, and copy buffers."""
        kernels.lerp(own_parts(self._averages), own_parts(self._weights), 1 - self._decay)
        for averaged, buffer in self._buffers:
            averaged.copy_(buffer)
