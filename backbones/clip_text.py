"""CLIP's text encoder, whose states of a caption's tokens are what networks read.

Source: Radford et al., arXiv:2103.00020, and the names of transformers' CLIPTextModel. It is no
diffusion network and has no registered name: it is loaded once, frozen, to make a table of states.

Legend: N captions, L tokens of a context, K width, V vocabulary, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from backbones import kernels
from backbones.judgement import load_exactly
from backbones.layers import Linear

PREFIX = "text_model."
# What files of whole CLIP hold besides, and older files of the encoder alone.
BESIDE = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
POSITION_IDS = "embeddings.position_ids"


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate the GELU as OpenAI's networks do."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": nn.functional.gelu,
}


class Embeddings(nn.Module):
    """Add the embeddings of tokens and of their places: (N, L) -> (N, L, K)."""

    def __init__(self, vocabulary: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, dim)
        self.position_embedding = nn.Embedding(tokens, dim)

    def forward(self, ids: Tensor) -> Tensor:
        places: Tensor = self.position_embedding.weight[: ids.shape[1]]
        tokens: Tensor = self.token_embedding(ids)
        return tokens + places


class CausalAttention(nn.Module):
    """Attend to a token and those before it: (N, L, K) -> (N, L, K)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in layers)
        later = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        h = kernels.attention(q, k, v, later)  # (N, h, L, K / h)
        out: Tensor = self.out_proj(h.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Apply two linear layers around an activation: (N, L, K) -> (N, L, K)."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Layer(nn.Module):
    """A pre-norm transformer layer: (N, L, K) -> (N, L, K)."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim)
        self.self_attn = CausalAttention(dim, heads)
        self.layer_norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    """The layers, under the name that files give them."""

    def __init__(self, depth: int, dim: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, activation) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipText(nn.Module):
    """Encode ids of tokens to their states after the last norm: (N, L) -> (N, L, K)."""

    def __init__(
        self,
        *,
        vocabulary: int = 49_408,
        tokens: int = 77,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"a text encoder needs a width divisible by its heads, got {dim}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.dim = dim
        self.embeddings = Embeddings(vocabulary, tokens, dim)
        self.encoder = Encoder(depth, dim, heads, hidden, activation)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        return states

    def load_stored(self, stored: Mapping[str, Tensor], file: str) -> None:
        """Take the weights of a file of the encoder alone, or of the whole of CLIP.

        Raises:
            ValueError: The file lacks weights, or holds others.
        """
        weights = {
            name.removeprefix(PREFIX): tensor.float()
            for name, tensor in stored.items()
            if not name.startswith(BESIDE) and not name.endswith(POSITION_IDS)
        }
        load_exactly(self, weights, "CLIP text encoder", file)
