"""The two ends of a residual branch of 1x1 convolutions, modulated and gated by adaLN-Zero.

x (N, C, H, W), shift, scale and gate (N, C, 1, 1), h (N, K, H, W), factor (N, K, 1, 1) or None.

    adaln_pointwise_gelu   the GELU of conv(adaln(x));  weight (C_out, C, 1, 1)
    pointwise_gated        x + gate conv(factor h);     weight (C, K, 1, 1)
"""

from __future__ import annotations

from torch import Tensor

from backbones.kernels import rows, rows_linear
from backbones.kernels.adaln import EPS, adaln2d
from backbones.kernels.conv_gelu import pointwise_gelu
from backbones.kernels.gates import addcmul
from backbones.kernels.gates import scale as scale_channels
from backbones.kernels.linear import pointwise
from backbones.kernels.op import Choice, Op


def _reference_enter_gelu(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return pointwise_gelu(adaln2d(x, shift, scale), weight, bias)


def _reference_leave(
    x: Tensor, gate: Tensor, h: Tensor, weight: Tensor, bias: Tensor, factor: Tensor | None = None
) -> Tensor:
    if factor is not None:
        h = scale_channels(h, factor)
    return addcmul(x, gate, pointwise(h, weight, bias))


def _enter_gelu(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rows_linear.enter_gelu(x, shift, scale, weight, bias, EPS)


adaln_pointwise_gelu = Op(
    "adaln_pointwise_gelu",
    [
        Choice("rows", _enter_gelu, rows_linear.supports_enter, rows.pays),
        Choice("reference", _reference_enter_gelu),
    ],
)

pointwise_gated = Op(
    "pointwise_gated",
    [
        Choice("rows", rows_linear.leave, rows_linear.supports_leave, rows.pays),
        Choice("reference", _reference_leave),
    ],
)
