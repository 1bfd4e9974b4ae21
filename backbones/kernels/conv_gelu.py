"""A convolution that keeps the size, and exact GELU.

x (N, C, H, W), weight (C_out, C / groups, k, k) with odd k, bias (C_out,) -> (N, C_out, H, W).

`depthwise_gelu` stands in DiCo's conv module (equation 3), `pointwise_gelu` (1x1) in its
feed-forward network. Memory bounds both, so every pass over the activations counts. Without
gradients oneDNN applies GELU while it writes the convolution's output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels import rows
from backbones.kernels.adaln import takes_triton
from backbones.kernels.linear import WIDE, pointwise
from backbones.kernels.linear import supports as onednn_supports
from backbones.kernels.op import Choice, Op, never, outside_graphs


def _convolve_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


# A depthwise convolution that keeps the size, with a bias or without.
depthwise = Op(
    "depthwise",
    [
        Choice("rows", rows.depthwise, rows.supports_depthwise, rows.pays_in_threads),
        Choice("reference", _convolve_channels),
    ],
)

# Exact GELU of a tensor of any shape.
gelu = Op(
    "gelu",
    [
        Choice("rows", rows.gelu, rows.supports_gelu, rows.pays_in_threads),
        Choice("reference", F.gelu),
    ],
)


def reference_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel, then apply GELU."""
    return F.gelu(_convolve_channels(x, weight, bias))


def reference_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the 1x1 convolution, then GELU."""
    return gelu(pointwise(x, weight, bias))


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Let oneDNN convolve and apply GELU at once."""
    groups = x.shape[1] // weight.shape[1]
    padding = [weight.shape[-1] // 2] * 2
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, [1, 1], [1, 1], groups, "gelu", [], "none"
    )


def _onednn_supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return onednn_supports(x, weight, bias) and not torch.is_grad_enabled()


def _onednn_pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    # A compiler fuses GELU by itself.
    return len(weight) >= WIDE and not torch.compiler.is_compiling()


@outside_graphs
def triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run one Triton kernel forward and two backward."""
    from backbones.kernels.depthwise_triton import depthwise_gelu as fused_depthwise

    return fused_depthwise(x, weight, bias)


def _triton_supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return takes_triton(x) and x.is_contiguous(memory_format=torch.channels_last)


_ONEDNN = Choice("onednn", onednn, _onednn_supports, _onednn_pays)

depthwise_gelu = Op(
    "depthwise_gelu",
    [
        Choice("triton", triton, _triton_supports, pays=never),
        _ONEDNN,
        Choice("rows", rows.depthwise_gelu, rows.supports_depthwise, rows.pays_in_threads),
        Choice("reference", reference_depthwise),
    ],
)

pointwise_gelu = Op("pointwise_gelu", [_ONEDNN, Choice("reference", reference_pointwise)])
