"""The block of the controlled ablations: adaLN-Zero around a token mixer that is swapped.

Legend: N batch, C width, (H, W) grid, r FFN ratio.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import adaln2d, adaln_pointwise_gelu, pointwise_gated
from backbones.layers import Linear, Pointwise, gated


class Block(nn.Module):
    """Mixer and feed-forward network, each modulated and gated by adaLN-Zero.

    `gelu` is torch's `approximate`: 'none' or 'tanh'.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, gelu: str) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.gelu = gelu
        self.mixer = mixer
        self.fc1 = Pointwise(dim, hidden)
        self.fc2 = Pointwise(hidden, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[..., None, None].chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, C, 1, 1)

        x = gated(x, gate1, self.mixer(adaln2d(x, shift1, scale1)))  # (N, C, H, W)

        # Feed-forward network of two 1x1 convolutions.
        if self.gelu == "none":
            h = adaln_pointwise_gelu(x, shift2, scale2, self.fc1.weight, self.fc1.bias)
        else:
            h = F.gelu(self.fc1(adaln2d(x, shift2, scale2)), approximate=self.gelu)
        return pointwise_gated(x, gate2, h, self.fc2.weight, self.fc2.bias)  # (N, C, H, W)
