"""Captions as conditions: an index becomes context tokens and a pooled vector.

A network that reads text is called like any other: y (N,) holds indices of captions, and the number
of captions is the null caption. A frozen table, which is no part of the weights, says what each
index stands for: the states of a text encoder, or the ids of words for a `WordEncoder` inside the
network. In place of indices, y may also be a `Text`.

A network without a table reads codes of the indices, which stand for no words. They serve counts,
timings and tests; a training asks for a table.

Legend: N batch, M captions, L tokens of a context, K width of a token, P width of a pooled vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from backbones.layers import timestep_sinusoid
from backbones.words import WordEncoder


class Text(NamedTuple):
    """What captions are to a network."""

    context: Tensor
    """States of the tokens: (N, L, K)."""

    pooled: Tensor | None = None
    """One vector of the whole caption: (N, P)."""

    sizes: Tensor | None = None
    """SDXL's height, width, crop from top and left, target height and width: (N, 6)."""


class StoredStates(Protocol):
    """States of a text encoder on disk, which do not fit a memory."""

    shape: tuple[int, int, int]
    """(M + 1, L, K)."""

    sha256: str
    """Of all rows."""

    def take(self, y: Tensor) -> Tensor:
        """Read the rows of indices (N,), as (N, L, K) where the indices are."""
        ...


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """What every caption is to a network; the last row is the null caption's."""

    context: Tensor | StoredStates | None = None
    """States of a text encoder: (M + 1, L, K)."""

    pooled: Tensor | None = None
    """Pooled vectors of a text encoder: (M + 1, P)."""

    ids: Tensor | None = None
    """Ids of words, in place of states: (M + 1, L)."""

    encoder: str = ""
    """Hash of the text encoder's weights, or of the vocabulary."""

    def __len__(self) -> int:
        """Return the number of captions, without the null caption."""
        return self.shape[0] - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> CaptionTable:
        """Return the table itself: an average of a network shares the table with the network."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(M + 1, L, K) of states, (M + 1, L) of ids."""
        rows = self.ids if self.context is None else self.context
        if rows is None:
            raise ValueError("a table of captions needs states (context) or ids of words (ids)")
        return tuple(rows.shape)

    def take(self, y: Tensor) -> Text:
        """Look up the states and the pooled vectors of captions (N,)."""
        assert self.context is not None, "a table of ids has no states"
        context = self.context[y] if isinstance(self.context, Tensor) else self.context.take(y)
        pooled = None if self.pooled is None else self.pooled[y]  # (N, P)
        return Text(context, pooled)  # (N, L, K)

    def map(self, function: Callable[[Tensor], Tensor]) -> CaptionTable:
        """Return the table with a function applied to its tensors; what is on disk stays there."""

        def mapped(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        context = mapped(self.context) if isinstance(self.context, Tensor) else self.context
        return CaptionTable(context, mapped(self.pooled), mapped(self.ids), self.encoder)

    def digest(self) -> str:
        """Return the SHA-256 of all rows, for records."""
        content = hashlib.sha256(self.encoder.encode())
        for tensor in (self.context, self.pooled, self.ids):
            if tensor is not None and not isinstance(tensor, Tensor):
                content.update(tensor.sha256.encode())
            elif tensor is not None:
                content.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
                content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()


class Captions(nn.Module):
    """Look up what captions are to a network: (N,) -> Text.

    With a vocabulary, a trained encoder makes the states of the table's words.
    """

    def __init__(
        self,
        num_captions: int,
        tokens: int,
        dim: int,
        pooled_dim: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        if num_captions < 1:
            raise ValueError(f"a network needs at least one caption, got {num_captions}")
        if vocabulary is not None and pooled_dim is not None:
            raise ValueError("a word encoder makes no pooled vector; leave out vocabulary")

        # The table is given later; it is no part of the weights.
        self.num_captions = num_captions
        self.tokens = tokens
        self.dim = dim
        self.pooled_dim = pooled_dim
        self.encoder = None if vocabulary is None else WordEncoder(vocabulary, tokens, dim)
        self.table: CaptionTable | None = None

    def init_weights(self) -> None:
        """Draw the word encoder's tables again, after a network has drawn all weights its way."""
        if self.encoder is not None:
            self.encoder.init_tables()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Captions:
        """Move the table along with the weights, although it is none of them."""
        super()._apply(fn, recurse)
        if self.table is not None:
            self.table = self.table.map(fn)
        return self

    def give(self, table: CaptionTable, encoder: str | None = None) -> None:
        """Take a table.

        Args:
            table: The captions and the null caption.
            encoder: The hash of the text encoder that is needed; None takes any.

        Raises:
            ValueError: The table is empty, or is not of this network's shape or encoder.
        """
        self._check(table)
        if encoder is not None and table.encoder != encoder:
            raise ValueError(
                f"the table of captions is of the encoder {table.encoder or 'without a hash'}, "
                f"not of {encoder}; make the table again with that encoder"
            )
        self.table = table

    def _check(self, table: CaptionTable) -> None:
        """Raise ValueError, in a line, if a table is not what this network reads."""
        if len(table) < 1:
            raise ValueError("the table of captions is empty: it has no row besides the null one")
        if len(table) != self.num_captions:
            raise ValueError(
                f"the table has {len(table)} captions and a null one, the network is built for "
                f"{self.num_captions}; build it with num_classes={len(table)}"
            )

        # A table of ids is for a network with a word encoder, and only for such a network.
        if (self.encoder is None) != (table.ids is None):
            needs = "states of a text encoder" if self.encoder is None else "ids of words"
            raise ValueError(f"this network reads {needs}; give a table that holds them")
        if self.encoder is not None and table.ids is not None:
            self.encoder.check(table.ids)
        else:
            pooled = None if table.pooled is None else table.pooled.shape[-1]
            self._check_states(table.shape, pooled)

    def check_text(self, text: Text) -> None:
        """Raise ValueError if states have another shape than this network reads."""
        pooled = None if text.pooled is None else text.pooled.shape[-1]
        self._check_states(tuple(text.context.shape), pooled)

    def _check_states(self, shape: tuple[int, ...], pooled: int | None) -> None:
        _, tokens, dim = shape
        if tokens > self.tokens:
            raise ValueError(
                f"a caption of {tokens} tokens is longer than the context of {self.tokens}; "
                "shorten it, or build the network with more context_tokens"
            )
        if (tokens, dim, pooled) != (self.tokens, self.dim, self.pooled_dim):
            expected = f"{self.tokens} tokens of width {self.dim}, pooled {self.pooled_dim}"
            raise ValueError(
                f"the states of the captions are {tokens} tokens of width {dim}, pooled {pooled}; "
                f"this network reads {expected}: is it another text encoder?"
            )

    def forward(self, y: Tensor) -> Text:
        if self.table is None:
            return self._code(y)
        if self.encoder is not None and self.table.ids is not None:
            return Text(self.encoder(self.table.ids[y]))  # (N, L, K)
        return self.table.take(y)

    def _code(self, y: Tensor) -> Text:
        """Make codes of indices, which differ for all captions, the null caption among them."""
        known = ((y >= 0) & (y <= self.num_captions)).all()
        if y.is_cpu and not bool(known):
            raise IndexError(f"indices of captions lie in 0..{self.num_captions}, got {y.tolist()}")
        # A GPU checks by itself, as it does for a table of labels; the host would have to wait.
        torch._assert_async(known, f"indices of captions lie in 0..{self.num_captions}")
        place = y[:, None] * self.tokens + torch.arange(self.tokens, device=y.device)  # (N, L)
        if self.encoder is not None:
            return Text(self.encoder(place % self.encoder.vocabulary))
        context = timestep_sinusoid(place.flatten(), self.dim).unflatten(0, place.shape)
        pooled = None if self.pooled_dim is None else timestep_sinusoid(y, self.pooled_dim)
        return Text(context, pooled)


Work = tuple[Tensor, ...]


class TextNetwork(nn.Module):
    """A network that reads text: what does not depend on the time is work apart.

    A subclass sets `captions`, and defines `text_work`, whose tensors have a row per sample.
    """

    captions: Captions

    def __init__(self) -> None:
        super().__init__()
        # The place of each caption's row in the work that is kept, and that work.
        self.kept: tuple[Tensor, Work] | None = None

    def text_work(self, text: Text) -> Work:
        """Compute all that depends on the captions alone."""
        raise NotImplementedError

    def read(self, y: Tensor | Text) -> Work:
        """Return the text work of a batch, computed here or kept by `once_per_caption`."""
        if isinstance(y, Text):
            self.captions.check_text(y)
            return self.work_on(y)
        if self.kept is None:
            return self.work_on(self.captions(y))
        place, work = self.kept
        rows = place[y]  # (N,)
        return tuple(part[rows] for part in work)

    def work_on(self, text: Text) -> Work:
        """Do the text work in the type of the weights."""
        dtype = next(self.parameters()).dtype
        pooled = None if text.pooled is None else text.pooled.to(dtype)
        return self.text_work(text._replace(context=text.context.to(dtype), pooled=pooled))


@contextmanager
def once_per_caption(model: object, y: Tensor) -> Iterator[None]:
    """Compute the text work of captions once while active, for all calls inside.

    The calls name these captions and the null caption, and no others. Without a network that reads
    text this does nothing.

    Args:
        model: The network.
        y: Indices of captions, (N,).
    """
    if not isinstance(model, TextNetwork):
        yield
        return

    # Every caption has one row, wherever it stands in a batch.
    null = model.captions.num_captions
    distinct = torch.cat([y, torch.full_like(y[:1], null)]).unique()
    place = torch.full((null + 1,), len(distinct), device=y.device)  # other captions: out of range
    place[distinct] = torch.arange(len(distinct), device=y.device)
    with torch.no_grad():
        model.kept = place, model.work_on(model.captions(distinct))
    try:
        yield
    finally:
        model.kept = None
