"""Selection among implementations of one operation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch

_forced: dict[str, str] = {}
_ops: dict[str, Op] = {}
_counters: list[Callable[[int], AbstractContextManager[None]]] = []
_observers: list[Callable[..., None]] = []


@dataclass(eq=False)
class Choice:
    """One implementation. `supports` answers for the arguments of a call, without running it; where it does but does not
    `pay`, the choice is taken only by force. `ran` tells whether it did since `reset_used`."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., bool] = lambda *args, **kwargs: True
    pays: Callable[..., bool] = lambda *args, **kwargs: True
    ran: bool = field(default=False, init=False)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a function out of compiled graphs, as `torch.compiler.disable` does.

    `torch.compiler.disable` imports the compiler, which takes seconds. This waits until something
    else has imported it: before that, nothing can be compiled.
    """
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args)

    return call


class Op:
    """An operation: `choices` from most to least wanted; the last is the reference and supports everything.

    `macs` is the closed-form count of a call, for an operation whose implementations differ in what a counter sees.
    """

    def __init__(
        self, name: str, choices: list[Choice], macs: Callable[..., int] | None = None
    ) -> None:
        self.name, self.choices, self.macs = (
            name,
            {choice.name: replace(choice) for choice in choices},
            macs,
        )
        _ops[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        choice = self._pick(*args, **kwargs)
        choice.ran = True  # an attribute that nothing here reads: a compiled graph sets it at every call, and depends on none of it
        for observer in _observers:
            observer(self.name, *args, **kwargs)
        if self.macs and _counters:
            with _counters[-1](self.macs(*args, **kwargs)):
                return choice.run(*args, **kwargs)
        return choice.run(*args, **kwargs)

    def _pick(self, *args: Any, **kwargs: Any) -> Choice:
        if forced := _forced.get(self.name):
            choice = self.choices[forced]
            if not choice.supports(*args, **kwargs):
                raise ValueError(
                    f"{self.name} was forced to {forced!r}, which is not installed or does not take this device, dtype or bias"
                )
            return choice
        return next(
            choice
            for choice in self.choices.values()
            if choice.supports(*args, **kwargs) and choice.pays(*args, **kwargs)
        )


@contextmanager
def counting(counter: Callable[[int], AbstractContextManager[None]]) -> Iterator[None]:
    """While active, an op that has `macs` runs inside `counter(macs)`, which adds them and nothing that it sees."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.pop()


@contextmanager
def observing(observer: Callable[..., None]) -> Iterator[None]:
    """While active, `observer(name, *args)` hears of every call of an op before it runs."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Force implementations by name, e.g. `use(attention="reference")`; ValueError lists the known ones."""
    for name, choice in choices.items():
        if name not in _ops:
            raise ValueError(f"unknown kernel {name!r}; known: {', '.join(sorted(_ops))}")
        if choice not in _ops[name].choices:
            raise ValueError(
                f"{name} has no implementation {choice!r}; known: {', '.join(_ops[name].choices)}"
            )
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def references() -> dict[str, str]:
    """What `use` takes to force the reference of every op."""
    return {name: list(op.choices)[-1] for name, op in _ops.items()}


def used() -> dict[str, list[str]]:
    """The implementations that ran since `reset_used`, by op; in a replay of a CUDA graph nothing is heard of them."""
    found = {
        name: sorted(choice.name for choice in op.choices.values() if choice.ran)
        for name, op in sorted(_ops.items())
    }
    return {name: choices for name, choices in found.items() if choices}


def reset_used() -> None:
    for op in _ops.values():
        for choice in op.choices.values():
            choice.ran = False
