"""Agent attention: Han et al., ECCV 2024; Pu et al., "Efficient Diffusion Transformer with Step-wise Dynamic Attention Mediators", ECCV 2024."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import attention
from backbones.layers import Linear, check_size


class AgentAttention(nn.Module):
    """Pooled queries (agents) gather the values, the queries read from the agents; a depthwise 3x3 of the values is added.

    `biases` adds the position biases of both softmaxes: a bilinearly resized 7x7 table plus a row and a column term.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int],
        index: int,
        heads: int,
        agents: int = 16,
        biases: bool = True,
    ) -> None:
        super().__init__()
        side = math.isqrt(agents)
        if side * side != agents or dim % heads:
            raise ValueError(
                f"agent attention needs a square number of agents and a width divisible by its heads, got {agents}, {dim}, {heads}"
            )
        self.size, self.heads, self.side, self.biases = size, heads, side, biases
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if biases:
            height, width = size
            self.agent_table = _table(heads, agents, 7, 7)
            self.agent_row = _table(heads, agents, height, 1)
            self.agent_column = _table(heads, agents, 1, width)
            self.query_table = _table(heads, agents, 7, 7)
            self.query_row = _table(heads, height, 1, agents)
            self.query_column = _table(heads, 1, width, agents)

    def forward(self, x: Tensor) -> Tensor:
        if self.biases:
            check_size(x, self.size, "agent attention with position biases")
        n, c, height, width = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # (N, T, C)
        pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(n, c, height, width), self.side)
        agents = self._split(pooled.flatten(2).transpose(1, 2))  # (N, h, agents, e)
        to_agents, to_queries = self._position_biases() if self.biases else (None, None)
        gathered = attention(agents, self._split(k), self._split(v), to_agents)  # (N, h, agents, e)
        out = attention(self._split(q), agents, gathered, to_queries)  # (N, h, T, e)
        out = out.transpose(1, 2).reshape(n, -1, c)
        local = self.dwc(v.transpose(1, 2).reshape(n, c, height, width))  # (N, C, H, W)
        return (
            self.proj(out + local.flatten(2).transpose(1, 2))
            .transpose(1, 2)
            .reshape(n, c, height, width)
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _position_biases(self) -> tuple[Tensor, Tensor]:
        """Biases of the two softmaxes: (1, h, agents, T) and (1, h, T, agents)."""
        to_agents = F.interpolate(self.agent_table, size=self.size, mode="bilinear") + (
            self.agent_row + self.agent_column
        )
        to_queries = (
            F.interpolate(self.query_table, size=self.size, mode="bilinear")
            .flatten(2)
            .transpose(1, 2)
        )
        to_queries = to_queries + (self.query_row + self.query_column).flatten(1, 2)
        return to_agents.flatten(2)[None], to_queries[None]


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
