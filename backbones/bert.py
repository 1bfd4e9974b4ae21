"""BERT's encoder, whose states of a sentence's tokens are what networks read.

Source: Devlin et al., arXiv:1810.04805, and the names of transformers' BertModel. all-MiniLM-L6-v2
(Wang et al., arXiv:2002.10957; Reimers and Gurevych, arXiv:1908.10084) has this form. It is no
diffusion network and has no registered name: it is loaded once, frozen, to make a table of states.

Legend: N sentences, L tokens of the longest one, K width, V vocabulary, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.judgement import load_exactly
from backbones.layers import Linear

PREFIX = "bert."
# What files hold besides: the pooler of the first token, and heads of the tasks of its training.
BESIDE = ("pooler.", "cls.")
POSITION_IDS = "embeddings.position_ids"
EPS = 1e-12


class Embeddings(nn.Module):
    """Add embeddings of tokens, places and the first segment, then norm: (N, L) -> (N, L, K)."""

    def __init__(self, vocabulary: int, tokens: int, segments: int, dim: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, dim)
        self.position_embeddings = nn.Embedding(tokens, dim)
        self.token_type_embeddings = nn.Embedding(segments, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.position_embeddings.weight[: ids.shape[1]]
        x = self.word_embeddings(ids) + places + self.token_type_embeddings.weight[0]
        out: Tensor = self.LayerNorm(x)
        return out


class Attend(nn.Module):
    """Attend to all tokens of a sentence, without the last linear layer: (N, L, K)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in layers)
        return kernels.attention(q, k, v, bias).transpose(1, 2).flatten(2)  # (N, L, K)


class AddAndNorm(nn.Module):
    """Apply a linear layer, add the residual, then norm: (N, L, H), (N, L, K) -> (N, L, K)."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.dense = Linear(hidden, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class Layer(nn.Module):
    """A post-norm transformer layer: (N, L, K) -> (N, L, K)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        attend = {"self": Attend(dim, heads), "output": AddAndNorm(dim, dim)}
        self.attention = nn.ModuleDict(attend)
        self.intermediate = nn.ModuleDict({"dense": Linear(dim, hidden)})
        self.output = AddAndNorm(hidden, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class Bert(nn.Module):
    """Encode ids of tokens to their states: (N, L) -> (N, L, K).

    `lengths` (N,) says how many tokens of each sentence are no padding, which nothing attends to.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 30_522,
        tokens: int = 512,
        segments: int = 2,
        dim: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"a text encoder needs a width divisible by its heads, got {dim}")
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.dim = dim
        self.embeddings = Embeddings(vocabulary, tokens, segments, dim)
        layers = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]  # (N, L)
        x = self.embeddings(ids)
        bias = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
        for layer in self.encoder["layer"].children():
            x = layer(x, bias[:, None, None])
        return x

    def load_stored(self, stored: Mapping[str, Tensor], file: str) -> None:
        """Take the weights of a file of the encoder, with or without the heads of its training.

        Raises:
            ValueError: The file lacks weights, or holds others.
        """
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
        weights = {
            name: tensor.float()
            for name, tensor in plain.items()
            if not name.startswith(BESIDE) and name != POSITION_IDS
        }
        load_exactly(self, weights, "BERT encoder", file)
