"""adaLN in Triton, forward and backward: one pass over x each way; formulas as in adaln.py.

A program owns some rows (tokens) of one sample. It leaves its sums over rows, for the gradients
of shift and scale, as terms that are added up outside, so gradients are the same in every run.
In the code, r = 1 / sqrt(var + eps) and u = (x - mean) r.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.launch import launch

# Rows of a program.
ROWS = 16


@triton.jit
def _normalise(x, real, D, eps):
    """Return (u, r) of a row x (BLOCK,), whose places past D are zero."""
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(real, x - mean, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * r, r


@triton.jit
def _forward(
    x_ptr, shift_ptr, scale_ptr, y_ptr, T, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    # The sample's shift and scale serve all rows of the program.
    n = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < D
    shift = tl.load(shift_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)

    for row in range(ROWS):
        t = tl.program_id(0) * ROWS + row + 0 * column  # a vector, as masks have to be
        at = (n * T + t) * D + column
        mask = real & (t < T)
        u, _ = _normalise(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), real, D, eps)
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
    n = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < D
    scale = 1.0 + tl.load(scale_ptr + n * D + column, mask=real, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)

    for row in range(ROWS):
        t = tl.program_id(0) * ROWS + row + 0 * column  # a vector, as masks have to be
        at = (n * T + t) * D + column
        mask = real & (t < T)
        u, r = _normalise(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), real, D, eps)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        shift_sum += grad
        scale_sum += grad * u

        # The gradient of x leaves out what mean and variance take away.
        grad_u = grad * scale
        mean = tl.sum(grad_u, axis=0) / D
        along = tl.sum(grad_u * u, axis=0) / D
        grad_x = r * (grad_u - mean - u * along)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    term = (n * tl.num_programs(0) + tl.program_id(0)) * D + column
    tl.store(shift_terms + term, shift_sum, mask=real)
    tl.store(scale_terms + term, scale_sum, mask=real)


def _grid(x: Tensor) -> tuple[int, int]:
    """Return the number of programs: blocks of rows, and samples."""
    return triton.cdiv(x.shape[1], ROWS), len(x)


def _blocks(x: Tensor) -> dict[str, int]:
    return dict(ROWS=ROWS, BLOCK=triton.next_power_of_2(x.shape[-1]))


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        y = torch.empty_like(x)
        launch(_forward, _grid(x), x, shift, scale, y, *x.shape[1:], eps, **_blocks(x))
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        grid = _grid(x)
        grad_x = torch.empty_like(x)

        # Every program leaves one term for the gradients of shift and scale.
        terms = [x.new_empty(len(x), grid[0], x.shape[-1], dtype=torch.float32) for _ in range(2)]
        sizes = (*x.shape[1:], ctx.eps)
        launch(_backward, grid, x, scale, grad.contiguous(), grad_x, *terms, *sizes, **_blocks(x))
        grad_shift, grad_scale = (term.sum(1, keepdim=True).to(scale.dtype) for term in terms)
        return grad_x, grad_shift, grad_scale, None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise, scale and shift: x (N, T, D), shift and scale (N, 1, D) -> (N, T, D)."""
    return _AdaLN.apply(x, shift, scale, eps)
