"""Linear layers, and 1x1 convolutions as linear layers.

`linear` takes Linear's (out, in) weight: x (..., in) -> (..., out).

On a CPU, PyTorch multiplies float32 matrices with MKL and convolves with oneDNN. MKL uses AVX-512
on Intel's processors alone. On others it reaches half of oneDNN's speed, so a network of linear
layers would look slow beside a network of convolutions. Here both use oneDNN where there is
AVX-512. Without it MKL is as fast, and faster for the gradient of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels import rows, rows_linear
from backbones.kernels.op import Choice, Op

_ONEDNN = torch.backends.mkldnn.is_available()
# Asked here, since a compiled graph would break at the question.
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Multiply-accumulates below which a call of oneDNN costs more than it saves.
WORTHWHILE = 2**22
# Rows below which an operand is not worth laying out anew.
FEW = 256
# Channels from which another order of summation than the reference's is allowed. The committed
# records of narrower networks hold the reference's bits.
WIDE = 128


@torch.library.custom_op(
    "backbones::product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Hide the product from the compiler, whose own oneDNN product takes constant weights only."""
    return _product(x, weight, bias)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the transposed weight with oneDNN."""
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """A linear layer whose three products run on oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])  # (M, in)
        grads = grad.reshape(-1, grad.shape[-1])  # (M, out)
        grad_x = _product(grads, weight.t()).view(x.shape) if wants_x else None
        grad_weight = _multiply_transposed(grads, rows) if wants_weight else None
        grad_bias = grads.sum(0) if wants_bias else None
        return grad_x, grad_weight, grad_bias


def _multiply_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b: (M, p), (M, q) -> (p, q).

    PyTorch's operator copies an operand that is not contiguous, so it is laid out here. oneDNN
    repacks its weight faster if the wider operand is the weight. With few rows, as a condition
    has, that saves less than it costs to lay the result out as the weight is.
    """
    if a.shape[1] > b.shape[1] and len(a) > FEW:
        return _product(rows.transposed(b), a.t()).t()
    return _product(rows.transposed(a), b.t())


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply with oneDNN, forward and backward."""
    if torch.is_grad_enabled():
        return _OneDNN.apply(x, weight, bias)
    return _product(x, weight, bias)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether oneDNN takes the tensors: float32 on a CPU, without autocast."""
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _ONEDNN
    )


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * len(weight) >= WORTHWHILE


def _onednn_pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return _AVX512 and _is_large(x, weight)


linear = Op(
    "linear",
    [
        Choice("rows", rows_linear.linear, rows_linear.supports_linear, rows.pays),
        Choice("onednn", onednn, supports, _onednn_pays),
        Choice("reference", F.linear),
    ],
)


def as_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the pixels as the rows of a matrix, as they lie with channels last."""
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _linear_pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether a matrix product beats oneDNN's convolution.

    It does for single pixels, and in one thread; with several threads the convolution is as fast.
    """
    if x.shape[2] * x.shape[3] == 1 and min(weight.shape[:2]) >= WIDE:
        return supports(x, weight)
    # A compiler cannot ask for the number of threads.
    if torch.compiler.is_compiling():
        return False
    return (
        torch.get_num_threads() == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and supports(x, weight)
        and _is_large(x, weight)
    )


class _Row(torch.autograd.Function):
    """A 1x1 convolution of all pixels in one row.

    oneDNN's gradient of the weight is slower the squarer the image is, and slower still together
    with the gradient of the bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = F.conv2d(_as_one_row(x), weight, bias)  # (1, C_out, 1, N H W)
        return out.permute(0, 2, 3, 1).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        row = _as_one_row(grad)

        # The convolution's own backward pass gives both gradients of the row in one call.
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            row,
            _as_one_row(x),
            weight,
            bias_sizes=None,
            stride=[1, 1],
            padding=[0, 0],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[wants_x, wants_weight, False],
        )

        # The gradient goes back from the row of pixels to the layout of the input.
        if wants_x:
            pixels = grad_x.permute(0, 2, 3, 1).reshape(len(x), *x.shape[2:], -1)
            grad_x = pixels.permute(0, 3, 1, 2)

        return grad_x, grad_weight, row.sum((0, 2, 3)) if wants_bias else None


def _as_one_row(x: Tensor) -> Tensor:
    """View a batch as one image of one row, channels last: (N, C, H, W) -> (1, C, 1, N H W)."""
    return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1]).permute(0, 3, 1, 2)


def as_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve all pixels of the batch as one row."""
    return _Row.apply(x, weight, bias)


def _row_pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if not torch.is_grad_enabled() or min(weight.shape[:2]) < WIDE:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and x.shape[2] * x.shape[3] > 1


# A 1x1 convolution: x (N, C, H, W), weight (C_out, C, 1, 1), bias (C_out,) or None
# -> (N, C_out, H, W).
pointwise = Op(
    "pointwise",
    [
        Choice("rows", rows_linear.linear, rows_linear.supports_pointwise, rows.pays),
        Choice("linear", as_linear, pays=_linear_pays),
        Choice("row", as_row, supports, _row_pays),
        Choice("reference", F.conv2d),
    ],
)
