"""What is alive during a step: every storage from its first tensor to its last."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Follow the storages that operators make, forward and backward, in one thread.

    Tensors may be real or fake. Memory that an operator takes and gives back inside itself is not
    seen.

    Attributes:
        nbytes: of each storage, in the order in which they were made.
        events: storages from 1 on as they are made, and as their negatives when they are freed.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Prepare to follow all but the storages of known tensors."""
        super().__init__()
        self.nbytes: list[int] = []
        self.events: list[int] = []
        # Numbers of the living storages by their address; 0 for known ones.
        self._numbers = {_address(x): 0 for x in known}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def alive_bytes(self) -> int:
        """Return the bytes of the storages that are alive."""
        return sum(self.nbytes[number - 1] for number in self._references)

    def number_of(self, x: Tensor) -> int:
        """Return the number of a living tensor's storage; 0 if it was known before."""
        return self._numbers[_address(x)]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _address(x) not in self._numbers:
                self._add(x)
        return out

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address = _address(x)
        self.nbytes.append(storage.nbytes())
        number = len(self.nbytes)
        self.events.append(number)
        self._numbers[address] = number

        def forget(_: object) -> None:
            # The address may be used again.
            del self._numbers[address], self._references[number]
            self.events.append(-number)

        # A storage keeps its Python object as long as a tensor anywhere holds it.
        self._references[number] = weakref.ref(storage, forget)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@contextmanager
def frees_at_once() -> Iterator[None]:
    """Keep the collector of cycles from freeing storages at moments of its own."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
