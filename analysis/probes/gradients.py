"""The weights over tokens that any function of an image or a sequence has, from its Jacobian.

They put all mixers on one scale. The weight of token j on token i is ||d f_i / d x_j||_F over
channels. If f_i = sum_j A_ij V x_j, this is |A_ij| times a constant, which scaling to a sum of 1
removes. The gradient weights of a frozen attention are therefore its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from analysis.probes.implied import normalised


@dataclass(frozen=True)
class Estimator:
    """How squared norms of Jacobians are estimated: Hutchinson's method."""

    # Random directions per query.
    directions: int
    # Draws the directions.
    generator: torch.Generator


class Gradients:
    """The gradient weights of a function.

    ||J_ij||_F^2 is the mean of |u^T J_ij|^2 over vectors u of random signs. `floats` is the working
    memory of a row of one image: what the backward pass keeps for one image more, measured.

    Args:
        kind: how the arrays of a probe name these weights.
        f: x (N, C, H, W) -> (N, C', H, W) or, with `place`, x (N, S, C) -> (N, S, C').
        x: the input.
        place: position of each token of the grid in the sequence, (T,).
        estimator: how the norms are estimated.
    """

    heads = 1

    def __init__(
        self,
        kind: str,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Tensor | None,
        estimator: Estimator,
    ) -> None:
        self.kind = kind
        self.f = f
        self.x = x.detach()
        self.place = place
        self.estimator = estimator

        # Both batches save the weights, so their difference counts only what the items add.
        twice = _saved_bytes(f, self.x.repeat_interleave(2, dim=0))
        self.floats = (twice - _saved_bytes(f, self.x)) // (8 * len(x))

    def rows(self, head: int, queries: Tensor) -> Tensor:
        """Return the weights of queries (R,): (N, R, T)."""
        directions = self.estimator.directions
        total = self._squares(queries)
        for _ in range(directions - 1):
            total = total + self._squares(queries)
        return normalised((total / directions).sqrt())

    @torch.enable_grad()
    def _squares(self, queries: Tensor) -> Tensor:
        """Return |u^T J_ij|^2 for one random u: (N, R, T)."""
        # Items of a batch do not see each other, so each query is an item of its own.
        count = len(queries)
        x = self.x.repeat_interleave(count, dim=0).requires_grad_()  # (N*R, ...)
        out = self._tokens(self.f(x))  # (N*R, T, C')
        item = torch.arange(len(out), device=x.device)
        at_query = out[item, queries.repeat(len(self.x))]  # (N*R, C')

        # One backward pass through the signed sum gives the product with every item's Jacobian.
        signs = torch.randint(2, at_query.shape, generator=self.estimator.generator)
        signs = signs.to(at_query) * 2 - 1
        (gradient,) = torch.autograd.grad((at_query * signs).sum(), x)
        return self._tokens(gradient).double().square().sum(-1).unflatten(0, (-1, count))

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT if self.place is None else x[:, self.place]


@torch.enable_grad()
def _saved_bytes(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the bytes that a backward pass through f(x) would need.

    The network's weights are included. Nothing is stored here. A tensor that two operations need
    counts twice.
    """
    sizes: list[int] = []

    def pack(tensor: Tensor) -> None:
        sizes.append(tensor.numel() * tensor.element_size())

    with saved_tensors_hooks(pack, lambda packed: packed):
        f(x.detach().requires_grad_())
    return sum(sizes)
