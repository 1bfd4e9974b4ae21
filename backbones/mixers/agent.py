"""Agent attention.

Sources: Han et al., "Agent Attention", ECCV 2024, arXiv:2312.08874; Pu et al., "Efficient Diffusion
Transformer with Step-wise Dynamic Attention Mediators", ECCV 2024, arXiv:2408.05710.

Legend: N batch, C channels, (H, W) grid, T = HW tokens, h heads, e = C / h, A agents.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.kernels import attention, depthwise
from backbones.layers import Linear, check_size


class AgentAttention(nn.Module):
    """Attend through agents, which are pooled queries: (N, C, H, W) -> same.

    The agents gather the values, and the queries read from the agents. A depthwise 3x3 convolution
    of the values is added. `biases` adds a position bias to both softmaxes: a bilinearly resized
    7x7 table plus a row and a column term.
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
                "agent attention needs a square number of agents and a width divisible by its "
                f"heads, got {agents}, {dim}, {heads}"
            )

        self.size = size
        self.heads = heads
        self.side = side
        self.biases = biases

        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

        # Each bias is a table that is resized to the grid, plus a term per row and per column.
        if biases:
            height, width = size
            self.agent_table = _table(heads, agents, 7, 7)
            self.agent_row = _table(heads, agents, height, 1)
            self.agent_column = _table(heads, agents, 1, width)
            self.query_table = _table(heads, agents, 7, 7)
            self.query_row = _table(heads, height, 1, agents)
            self.query_column = _table(heads, 1, width, agents)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # 3 x (N, T, C)
        to_agents = to_queries = None
        if self.biases:
            check_size(x, self.size, "agent attention with position biases")
            to_agents, to_queries = self._position_biases()

        # Agents gather the values; queries read from the agents.
        pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(x.shape), self.side)
        agents = self._split(pooled.flatten(2).transpose(1, 2))  # (N, h, A, e)
        gathered = attention(agents, self._split(k), self._split(v), to_agents)  # (N, h, A, e)
        out = attention(self._split(q), agents, gathered, to_queries)  # (N, h, T, e)
        out = out.transpose(1, 2).reshape(n, -1, x.shape[1])  # (N, T, C)

        # Depthwise convolution of the values, whose channels lie last.
        image = v.contiguous().transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)
        local = depthwise(image, self.dwc.weight, self.dwc.bias)  # (N, C, H, W)
        out = self.proj(out + local.flatten(2).transpose(1, 2))  # (N, T, C)
        return out.transpose(1, 2).reshape(x.shape)  # (N, C, H, W)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _position_biases(self) -> tuple[Tensor, Tensor]:
        """Return the biases of the two softmaxes: (1, h, A, T) and (1, h, T, A)."""
        to_agents = _resize(self.agent_table, self.size)  # (h, A, H, W)
        to_agents = to_agents + (self.agent_row + self.agent_column)
        to_queries = _resize(self.query_table, self.size).flatten(2).transpose(1, 2)  # (h, T, A)
        to_queries = to_queries + (self.query_row + self.query_column).flatten(1, 2)
        return to_agents.flatten(2)[None], to_queries[None]


def _resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(table, size=size, mode="bilinear")


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
