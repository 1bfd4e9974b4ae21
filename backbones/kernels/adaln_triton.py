"""adaLN in Triton, forward and backward: one pass over x each way; formulas as in adaln.py.

A program owns some rows (tokens) of one sample. Its sums over rows for the gradients of shift and scale are terms that are
added up outside, so gradients are the same from run to run. r = 1 / sqrt(var + eps), u = (x - mean) r.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16  # of a program


@triton.jit
def _normal(x, real, D, eps):
    """(u, r) of a row x (BLOCK,), whose places past D are zero."""
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(real, x - mean, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * r, r


@triton.jit
def _forward(
    x_ptr, shift_ptr, scale_ptr, y_ptr, T, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    n, column = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    real = column < D
    shift = tl.load(shift_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)
    for row in range(ROWS):
        t = tl.program_id(0) * ROWS + row + 0 * column  # a vector, as masks have to be
        at, mask = (n * T + t) * D + column, real & (t < T)
        u, _ = _normal(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), real, D, eps)
        tl.store(y_ptr + at, (u * scale + shift).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x_ptr,
    scale_ptr,
    grad_ptr,
    grad_x_ptr,
    shift_terms,
    scale_terms,
    T,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, column = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    real = column < D
    scale = 1.0 + tl.load(scale_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)
    shift_sum, scale_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(ROWS):
        t = tl.program_id(0) * ROWS + row + 0 * column  # a vector, as masks have to be
        at, mask = (n * T + t) * D + column, real & (t < T)
        u, r = _normal(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), real, D, eps)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        shift_sum += grad
        scale_sum += grad * u
        through = grad * scale  # dL/du
        mean, along = tl.sum(through, axis=0) / D, tl.sum(through * u, axis=0) / D
        tl.store(
            grad_x_ptr + at,
            (r * (through - mean - u * along)).to(grad_x_ptr.dtype.element_ty),
            mask=mask,
        )
    term = (n * tl.num_programs(0) + tl.program_id(0)) * D + column
    tl.store(shift_terms + term, shift_sum, mask=real)
    tl.store(scale_terms + term, scale_sum, mask=real)


def _grid(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    samples, tokens, dim = x.shape
    return (triton.cdiv(tokens, ROWS), samples), dict(ROWS=ROWS, BLOCK=triton.next_power_of_2(dim))


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        grid, blocks = _grid(x)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _forward[grid](x, shift, scale, y, *x.shape[1:], eps, **blocks)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        grid, blocks = _grid(x)
        grad_x = torch.empty_like(x)
        terms = [x.new_empty(len(x), grid[0], x.shape[-1], dtype=torch.float32) for _ in range(2)]
        with torch.cuda.device_of(x):
            _backward[grid](
                x, scale, grad.contiguous(), grad_x, *terms, *x.shape[1:], ctx.eps, **blocks
            )
        shift, scale = (term.sum(1, keepdim=True).to(scale.dtype) for term in terms)
        return grad_x, shift, scale, None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _AdaLN.apply(x, shift, scale, eps)
