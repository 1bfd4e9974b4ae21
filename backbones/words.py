"""Words as a condition: ids of a small vocabulary, and the encoder that a network trains along.

Legend: N batch, L tokens of a context, K width of a token, h heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbones.layers import Mlp, SelfAttention

BEGIN, PAD = "[begin]", "[pad]"
HEADS = 4


class WordEncoder(nn.Module):
    """Embed words and their places, then one pre-norm transformer layer: (N, L) -> (N, L, K)."""

    def __init__(self, vocabulary: int, tokens: int, dim: int) -> None:
        super().__init__()
        if dim % HEADS:
            raise ValueError(f"a word encoder needs a width divisible by {HEADS}, got {dim}")
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.words = nn.Embedding(vocabulary, dim)
        self.places = nn.Parameter(torch.empty(tokens, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, HEADS)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, approximate="none")
        self.norm = nn.LayerNorm(dim)
        self.init_tables()

    def init_tables(self) -> None:
        """Draw the words and their places from N(0, 0.5)."""
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.normal_(self.places, std=0.5)

    def check(self, ids: Tensor) -> None:
        """Raise ValueError for ids of another length, or of words that this encoder has not."""
        if ids.shape[-1] > self.tokens:
            raise ValueError(
                f"a caption of {ids.shape[-1]} tokens is longer than the context of {self.tokens}; "
                "shorten it, or build the network with more context_tokens"
            )
        if ids.shape[-1] != self.tokens:
            raise ValueError(f"captions need {self.tokens} tokens, got {ids.shape[-1]}; pad them")
        if not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ValueError(
                f"ids of words lie in 0..{self.vocabulary - 1}, "
                f"got {int(ids.min())}..{int(ids.max())}: is it another vocabulary?"
            )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places  # (N, L, K)
        x = x + self.attn(self.norm1(x))
        return self.norm(x + self.mlp(self.norm2(x)))  # (N, L, K)


class Vocabulary:
    """The words of captions: each has an id, after those of the begin and of the padding."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (BEGIN, PAD, *words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("a vocabulary names every word once")

    def __len__(self) -> int:
        return len(self.words)

    def digest(self) -> str:
        """Return the hash that tells vocabularies apart."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]

    def encode(self, captions: Sequence[str], tokens: int) -> Tensor:
        """Return the ids of captions, and of the null caption after them: (M + 1, L).

        Raises:
            ValueError: There are no captions, one is too long, or a word is unknown.
        """
        if not captions:
            raise ValueError("the table of captions is empty: give at least one caption")

        # The null caption is the empty one. Rows end with padding.
        rows = []
        for caption in (*captions, ""):
            words = caption.split()
            if unknown := [word for word in words if word not in self.ids]:
                raise ValueError(
                    f"{caption!r}: the vocabulary has no word {', '.join(map(repr, unknown))}; "
                    f"known: {', '.join(self.words[2:])}"
                )
            if len(words) + 1 > tokens:
                raise ValueError(
                    f"{caption!r} has {len(words) + 1} tokens with {BEGIN}, "
                    f"longer than the context of {tokens}; shorten it"
                )
            ids = [self.ids[word] for word in (BEGIN, *words)]
            rows.append(ids + [self.ids[PAD]] * (tokens - len(ids)))
        return torch.tensor(rows)
