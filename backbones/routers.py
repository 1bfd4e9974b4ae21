"""Routers that switch parts of a network off, and the share of its work that they leave on.

Source: DyDiT (arXiv:2410.03456) and github.com/alibaba-damo-academy/DyDiT at 0ddc509.

Legend: N batch, T tokens, D width, L blocks, h heads and groups of hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.layers import Linear

# Softens the gradient of a gate.
TEMPERATURE = 5.0


@dataclass(frozen=True)
class Gates:
    """Gates of all blocks, 0 or 1; or the noise that is added to what decides them."""

    heads: Tensor
    """(N, L, h); noise has h - 1, because the first head is always on."""

    groups: Tensor
    """(N, L, h) of the hidden channels; noise has h - 1."""

    tokens: Tensor
    """(N, L, T)."""

    def of_block(self, index: int) -> Gates:
        """Return those of one block: (N, h), (N, h), (N, T)."""
        return Gates(self.heads[:, index], self.groups[:, index], self.tokens[:, index])


def used_share(gates: Gates, attention_macs: float, mlp_macs: float) -> Tensor:
    """Return the share of the gated work that the gates leave on, of each image: (N,).

    Gated are attention with its products and the MLP. Groups are switched for all tokens alike, so
    the product of the two means is what a gathered MLP computes.

    Args:
        gates: Of all blocks.
        attention_macs: Multiply-accumulates of a block's attention when all is on.
        mlp_macs: The same of its MLP.
    """
    heads = gates.heads.mean(dim=-1)  # (N, L)
    hidden = gates.groups.mean(dim=-1) * gates.tokens.mean(dim=-1)  # (N, L)
    used = (heads * attention_macs + hidden * mlp_macs).mean(dim=-1)  # (N,)
    return used / (attention_macs + mlp_macs)


def open_gate(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Return 1 where logits and noise are above zero, else 0; the gradient is a soft gate's.

    With logistic noise, log(u) - log(1 - u), a gate is on with probability sigmoid(logit).
    """
    if noise is not None:
        logits = logits + noise
    soft = torch.sigmoid(logits / TEMPERATURE)
    hard = (logits > 0).to(soft.dtype)
    return hard + (soft - soft.detach())


class WidthRouter(nn.Module):
    """Choose heads or groups by time; the first is always on: (N, D) -> (N, h)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.router = Linear(dim, heads - 1)

    def forward(self, time: Tensor, noise: Tensor | None) -> Tensor:
        gate = open_gate(self.router(time), noise)  # (N, h - 1)
        return torch.cat([torch.ones_like(gate[:, :1]), gate], dim=1)  # (N, h)


class TokenRouter(nn.Module):
    """Choose tokens by the residual stream, which no norm precedes: (N, T, D) -> (N, T)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_head = nn.Sequential(Linear(dim, dim // 16), nn.ReLU(), Linear(dim // 16, 1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return open_gate(self.mlp_head(x)[..., 0], noise)  # (N, T)
