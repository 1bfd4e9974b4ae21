"""Operations with a plain-torch reference and faster choices: the only home of GPU libraries.

An `Op` takes its first choice that is installed, supports the arguments and pays.
`use` forces choices by name, and `used` tells which ran. `counting` lets an op count its own
multiply-accumulates, and `observing` shows the arguments of every call.
"""

from backbones.kernels.adaln import adaln, adaln2d
from backbones.kernels.attention import attention, channel_attention, unpack
from backbones.kernels.branches import (
    adaln_pointwise_gelu,
    pointwise_gated,
)
from backbones.kernels.causal_conv import causal_conv
from backbones.kernels.conv3x3 import conv3x3
from backbones.kernels.conv_gelu import depthwise, depthwise_gelu, gelu, pointwise_gelu
from backbones.kernels.deformable import deformable
from backbones.kernels.diagonal_ssm import diagonal_ssm
from backbones.kernels.gated_linear import gated_linear
from backbones.kernels.gates import addcmul, pool, scale
from backbones.kernels.linear import linear, pointwise
from backbones.kernels.linear_attention import linear_attention
from backbones.kernels.op import (
    Op,
    counting,
    observing,
    outside_graphs,
    references,
    reset_used,
    use,
    used,
)
from backbones.kernels.sample_depthwise import sample_depthwise
from backbones.kernels.selective_scan import selective_scan
from backbones.kernels.shuffle import pixel_shuffle, pixel_unshuffle
from backbones.kernels.update import Rates, adamw, lerp

__all__ = [
    "Op",
    "Rates",
    "adaln",
    "adamw",
    "adaln2d",
    "adaln_pointwise_gelu",
    "addcmul",
    "attention",
    "causal_conv",
    "channel_attention",
    "conv3x3",
    "counting",
    "deformable",
    "depthwise",
    "depthwise_gelu",
    "diagonal_ssm",
    "gated_linear",
    "gelu",
    "lerp",
    "linear",
    "linear_attention",
    "observing",
    "outside_graphs",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pointwise",
    "pointwise_gated",
    "pointwise_gelu",
    "pool",
    "references",
    "reset_used",
    "sample_depthwise",
    "scale",
    "selective_scan",
    "unpack",
    "use",
    "used",
]
