"""What gates are made of, differentiated with fewer passes over large tensors than PyTorch makes: it multiplies by the one of `value=1`
in a product's gradient, and writes out, in another layout than the activation's, the gradient of a mean, the same for all pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.op import Choice, Op


class _AddCMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.addcmul(x, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_x, of_a, of_b = ctx.needs_input_grad
        return (
            grad if of_x else None,
            grad * b if of_a else None,
            grad * a if of_b else None,
        )  # autograd sums what was broadcast


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.adaptive_avg_pool2d(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(
            ctx.shape
        )  # added as it is to the other gradients of x


def _pays(*args: Tensor) -> bool:
    return (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )  # a compiler leaves such passes out by itself


addcmul = Op(
    "addcmul",
    [Choice("fewer_passes", _AddCMul.apply, pays=_pays), Choice("reference", torch.addcmul)],
)
"""x + a b, of shapes that broadcast to one."""

pool = Op(
    "pool",
    [
        Choice("fewer_passes", _Mean.apply, pays=_pays),
        Choice("reference", lambda x: F.adaptive_avg_pool2d(x, 1)),
    ],
)
"""Global average pooling: (N, C, H, W) -> (N, C, 1, 1)."""
