"""Softmax attention of few tokens in C: see rows.py.

Legend: N batch, h heads, T queries, S keys, e channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.rows import LANES, call, fits

# Keys from which PyTorch's fused attention, which keeps no weights, is faster.
MANY = 512
# Weights that a call keeps at most for the backward pass: 32 MB.
MOST_WEIGHTS = 2**23


def supports_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether `attend` takes the tensors; a bias is the same for every sample."""
    shape = (1, q.shape[1], q.shape[2], k.shape[2])
    return (
        k.shape == v.shape
        and k.stride() == v.stride()
        and q.stride(-1) == k.stride(-1) == 1
        and k.shape[2] < MANY
        and math.prod(q.shape[:3]) * k.shape[2] <= MOST_WEIGHTS
        and (bias is None or (bias.shape == shape and fits(bias)))
        and all(map(fits, (q, k, v)))
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        n, h, t, e = q.shape
        s = k.shape[2]
        if bias is not None:
            bias = bias.contiguous()
        out = q.new_empty(n, t, h, e)
        weights = q.new_empty(n, h, t, _round_up(s))
        wide = _round_up(e)
        scratch = q.new_empty((2 * t + s) * wide + wide * _round_up(s))
        tensors = (q, k, v, bias, out, weights, scratch)
        strides = (*q.stride()[:3], *k.stride()[:3])
        call("attend_forward", *tensors, n, h, t, s, e, *strides, scale, channels=())
        ctx.save_for_backward(q, k, v, weights)
        ctx.has_bias = bias is not None
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        n, h, t, e = q.shape
        s = k.shape[2]
        grad = grad.transpose(1, 2).contiguous()
        grad_q, grad_k, grad_v = _empty_gradients(q, k)
        grad_bias = q.new_empty(1, h, t, s) if ctx.has_bias else None
        wide, keys = _round_up(e), _round_up(s)
        scratch = q.new_empty((2 * t + s + max(t, s) + keys) * wide + t * keys)
        tensors = (q, k, v, weights, grad, grad_q, grad_k, grad_v, grad_bias, scratch)
        strides = [size for x in (q, k, grad_q, grad_k) for size in x.stride()[:3]]
        call("attend_backward", *tensors, n, h, t, s, e, *strides, ctx.scale, channels=())
        return grad_q, grad_k, grad_v, grad_bias, None


def _round_up(size: int) -> int:
    return -(-size // LANES) * LANES


def _empty_gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients; of self-attention, as a linear layer's output lies."""
    if q.shape == k.shape:
        n, h, t, e = q.shape
        packed = q.new_empty(n, t, 3, h, e).permute(2, 0, 3, 1, 4)
        return packed[0], packed[1], packed[2]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend, with the weights of the keys kept for the backward pass."""
    return _Attend.apply(q, k, v, bias, q.shape[-1] ** -0.5)


def attend_unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the softmax of plain products."""
    return _Attend.apply(q, k, v, None, 1.0)


class _Unpack(torch.autograd.Function):
    """Queries, keys and values of a layer's output, whose gradients are not copied if adjacent."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first = grads[0]
        n, h, t, e = first.shape
        strides = (3 * t * h * e, e, 3 * h * e, 1)
        size = first.element_size() * h * e
        adjacent = all(
            grad.stride() == strides and grad.data_ptr() == first.data_ptr() + i * size
            for i, grad in enumerate(grads)
        )
        if adjacent:
            return first.as_strided((n, t, 3, h, e), (3 * t * h * e, 3 * h * e, h * e, e, 1))
        return torch.stack(grads, 2).permute(0, 3, 2, 1, 4)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part a layer's output: (N, T, 3, h, e) -> three of (N, h, T, e)."""
    return _Unpack.apply(packed)
