"""A convolution that keeps the size, and exact GELU: x (N, C, H, W), weight (C_out, C / groups, k, k), k odd, bias (C_out,) -> (N, C_out, H, W).

Depthwise, as DiCo's conv module (equation 3), and 1x1, as its feed-forward network has it. Both make tensors that memory
bounds, where each pass counts. Without gradients oneDNN applies GELU as it writes the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.adaln import on_gpu, unmeasured
from backbones.kernels.linear import WIDE, pointwise
from backbones.kernels.linear import supports as onednn_supports
from backbones.kernels.op import Choice, Op, outside_graphs


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)))


def separate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(pointwise(x, weight, bias))


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups, padding = x.shape[1] // weight.shape[1], [weight.shape[-1] // 2] * 2
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, [1, 1], [1, 1], groups, "gelu", [], "none"
    )


def _without_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return onednn_supports(x, weight, bias) and not torch.is_grad_enabled()


def _pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return len(weight) >= WIDE and not torch.compiler.is_compiling()  # a compiler fuses by itself


@outside_graphs
def triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from backbones.kernels.depthwise_triton import depthwise_gelu as run

    return run(x, weight, bias)


def _triton_supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return on_gpu(x) and x.is_contiguous(memory_format=torch.channels_last)


_ONEDNN = Choice("onednn", onednn, _without_gradient, _pays)
depthwise_gelu = Op(
    "depthwise_gelu",
    [
        Choice("triton", triton, _triton_supports, unmeasured),
        _ONEDNN,
        Choice("reference", depthwise),
    ],
)
pointwise_gelu = Op("pointwise_gelu", [_ONEDNN, Choice("reference", separate)])
