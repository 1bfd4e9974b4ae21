"""The weights that any function of an image or a sequence has, from its Jacobian: one scale for all mixers.

The weight of token j on token i is ||d f_i / d x_j||_F over channels. Where f_i = sum_j A_ij V x_j this is |A_ij| up to
a factor that the scaling to sum 1 takes out, so that a frozen attention's gradient weights are its attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from analysis.probes.implied import normalised


class Gradients:
    """f: x (N, C, H, W) -> (N, C', H, W) or, with `place` (T,), x (N, S, C) -> (N, S, C').

    ||J_ij||_F^2 is the mean of |u^T J_ij|^2 over random signs u (Hutchinson), `directions` of them for every query. A row's
    working memory is what one image more keeps for the backward pass, measured.
    """

    heads = 1

    def __init__(
        self,
        kind: str,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Tensor | None,
        directions: int,
        generator: torch.Generator,
    ) -> None:
        self.kind, self.f, self.x, self.place, self.directions, self.generator = (
            kind,
            f,
            x.detach(),
            place,
            directions,
            generator,
        )
        self.floats = (_kept(f, self.x.repeat_interleave(2, dim=0)) - _kept(f, self.x)) // (
            8 * len(x)
        )

    def rows(self, head: int, queries: Tensor) -> Tensor:
        total = sum(self._squares(queries) for _ in range(self.directions))
        return normalised((total / self.directions).sqrt())

    @torch.enable_grad()
    def _squares(self, queries: Tensor) -> Tensor:
        """|u^T J_ij|^2 for one u: (N, R, T). A query is an item of the batch, since items do not see each other."""
        count = len(queries)
        x = self.x.repeat_interleave(count, dim=0).requires_grad_()  # (N*R, ...)
        out = self._tokens(self.f(x))  # (N*R, T, C')
        at = out[torch.arange(len(out), device=x.device), queries.repeat(len(self.x))]  # (N*R, C')
        signs = torch.randint(2, at.shape, generator=self.generator).to(at) * 2 - 1
        (gradient,) = torch.autograd.grad((at * signs).sum(), x)
        return self._tokens(gradient).double().square().sum(-1).unflatten(0, (-1, count))

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT if self.place is None else x[:, self.place]


@torch.enable_grad()
def _kept(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that a backward pass would need of this forward pass, the network's weights among them; nothing is kept for it here.

    What two operations need counts twice.
    """
    heard: list[int] = []
    with saved_tensors_hooks(
        lambda tensor: heard.append(tensor.numel() * tensor.element_size()), lambda nothing: nothing
    ):
        f(x.detach().requires_grad_())
    return sum(heard)
