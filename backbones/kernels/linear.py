"""Linear layers, and 1x1 convolutions as linear layers: Linear's (out, in) weight, x (..., in) -> (..., out).

On a CPU PyTorch multiplies float32 matrices by MKL and convolves by oneDNN. MKL runs at less than half its speed on
processors that are not Intel's, where a network of linear layers would look slow beside one of convolutions; here both use oneDNN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.op import Choice, Op

_ONEDNN = torch.backends.mkldnn.is_available()
WORTHWHILE = 2**22  # multiply-accumulates; below, a call costs more than it saves
FEW = 256  # rows
WIDE = 128  # channels from which other sums than the reference's are asked for; the committed records of narrower networks hold its bits


@torch.library.custom_op(
    "backbones::product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For the compiler, whose own version of oneDNN's product takes constant weights only."""
    return _product(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows, grads = (
            x.reshape(-1, x.shape[-1]),
            grad.reshape(-1, grad.shape[-1]),
        )  # (M, in), (M, out)
        grad_x = _product(grads, weight.t()).view(x.shape) if wants_x else None
        grad_weight = _wide(grads, rows) if wants_weight else None
        return grad_x, grad_weight, grads.sum(0) if wants_bias else None


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, (M, p), (M, q) -> (p, q), with the wider of the two as the weight, which oneDNN repacks faster.

    Of few rows, as a condition has, that is less than it costs to lay the result out as the weight is.
    """
    return (
        _product(b.t(), a.t()).t()
        if a.shape[1] > b.shape[1] and len(a) > FEW
        else _product(a.t(), b.t())
    )


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _OneDNN.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _ONEDNN
    )


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return x.numel() * len(weight) >= WORTHWHILE


linear = Op("linear", [Choice("onednn", onednn, supports, _pays), Choice("reference", F.linear)])


def as_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Channels last, the pixels are the rows of a matrix as they lie."""
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _rows_pay(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """oneDNN's convolution is the faster of the two in several threads, forward and backward, and the slower in one, and of single pixels."""
    if x.shape[2] * x.shape[3] == 1 and min(weight.shape[:2]) >= WIDE:
        return supports(x, weight)
    if torch.compiler.is_compiling():  # which cannot ask for threads
        return False
    return (
        torch.get_num_threads() == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and supports(x, weight)
        and _pays(x, weight)
    )


class _Row(torch.autograd.Function):
    """oneDNN's gradient of a 1x1 convolution's weight is the slower the squarer the image, and slower still with the bias's in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = F.conv2d(_one_row(x), weight, bias)
        return out.permute(0, 2, 3, 1).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        row = _one_row(grad)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            row,
            _one_row(x),
            weight,
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [wants_x, wants_weight, False],
        )
        if wants_x:
            grad_x = (
                grad_x.permute(0, 2, 3, 1).reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
            )
        return grad_x, grad_weight, row.sum((0, 2, 3)) if wants_bias else None


def _one_row(x: Tensor) -> Tensor:
    """The pixels of a batch as those of one image of one row, channels last: (N, C, H, W) -> (1, C, 1, N H W)."""
    return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1]).permute(0, 3, 1, 2)


def as_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Row.apply(x, weight, bias)


def _row_pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if not torch.is_grad_enabled() or min(weight.shape[:2]) < WIDE:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and x.shape[2] * x.shape[3] > 1


pointwise = Op(
    "pointwise",
    [
        Choice("linear", as_linear, pays=_rows_pay),
        Choice("row", as_row, supports, _row_pays),
        Choice("reference", F.conv2d),
    ],
)
"""A 1x1 convolution: x (N, C, H, W), weight (C_out, C, 1, 1), bias (C_out,) or None -> (N, C_out, H, W)."""
