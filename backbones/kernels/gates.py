"""What gates are made of, with fewer passes over large tensors backward than PyTorch makes.

PyTorch multiplies a product's gradient by `value=1`. It also writes out the gradient of a mean,
which is the same for all pixels, in another layout than the activation's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels import rows
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
        wants_x, wants_a, wants_b = ctx.needs_input_grad
        # Autograd sums over what was broadcast.
        return (
            grad if wants_x else None,
            grad * b if wants_a else None,
            grad * a if wants_b else None,
        )


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.adaptive_avg_pool2d(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The expanded gradient is never written out, only added to the other gradients of x.
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


def _pays(*args: Tensor) -> bool:
    # A compiler drops such passes by itself.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _reference_pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


# x + a b, of shapes that broadcast to one.
addcmul = Op(
    "addcmul",
    [
        Choice("rows", rows.gate, rows.supports_gate, rows.pays_in_threads),
        Choice("fewer_passes", _AddCMul.apply, pays=_pays),
        Choice("reference", torch.addcmul),
    ],
)

# Global average pooling: (N, C, H, W) -> (N, C, 1, 1).
pool = Op(
    "pool",
    [
        Choice("rows", rows.mean, rows.supports_mean, rows.pays_in_threads),
        Choice("fewer_passes", _Mean.apply, pays=_pays),
        Choice("reference", _reference_pool),
    ],
)

# A product with a gate of every sample: x (N, C, H, W), gate (N, C, 1, 1) -> (N, C, H, W).
scale = Op(
    "scale",
    [
        Choice("rows", rows.scale, rows.supports_scale, rows.pays_in_threads),
        Choice("reference", torch.mul),
    ],
)
