"""Work done ahead in threads, handed over in order. Standard library only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Iterator[Result]:
    """`function` of every item, in the items' order, at most `depth` results in flight. Exceptions surface at their item."""
    with ThreadPoolExecutor(workers) as pool:
        flying: deque = deque()
        try:
            for item in items:
                flying.append(pool.submit(function, item))
                if len(flying) >= depth:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
