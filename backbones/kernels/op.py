"""Select one of several implementations of an operation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Takes the multiply-accumulates of a call, and whether the call only samples between pixels.
Counter = Callable[[int, bool], AbstractContextManager[None]]

_ops: dict[str, Op] = {}
_forced: dict[str, str] = {}
_counters: list[Counter] = []
_observers: list[Callable[..., None]] = []


def always(*args: Any, **kwargs: Any) -> bool:
    """Accept every call."""
    return True


def never(*args: Any, **kwargs: Any) -> bool:
    """Accept no call: such a choice is taken only by force, until a measurement shows it pays."""
    return False


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a function out of compiled graphs, as `torch.compiler.disable` does.

    `torch.compiler.disable` imports the compiler, which takes seconds. This decorator waits until
    something else has imported it: before that, nothing can be compiled.
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


@dataclass(eq=False)
class Choice:
    """One implementation of an operation."""

    name: str
    # The implementation, with the operation's signature.
    run: Callable[..., Any]
    # Whether it can take the arguments of a call.
    supports: Callable[..., bool] = always
    # Whether it is worth taking; one that does not pay is taken only by force.
    pays: Callable[..., bool] = always
    # Whether it ran since `reset_used`.
    ran: bool = field(default=False, init=False)


def meta_choice(like: int = 0) -> Choice:
    """Return the choice of the meta device, which computes nothing.

    By force, tensors that are fake take it too.

    Args:
        like: index of the argument that has the output's shape and dtype.
    """
    return Choice(
        "shape",
        lambda *args: _Shape.apply(like, *args),
        supports=lambda *args: args[0].is_meta or isinstance(args[0], FakeTensor),
        pays=lambda *args: args[0].is_meta,
    )


class _Shape(torch.autograd.Function):
    """An output like one of the arguments, and gradients like each of them."""

    @staticmethod
    def forward(ctx: Any, like: int, *args: Any) -> Tensor:
        # A fused kernel keeps its arguments for the backward pass.
        ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in args))
        return torch.empty_like(args[like])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)


class Op:
    """An operation with several implementations, called like a function."""

    def __init__(
        self,
        name: str,
        choices: list[Choice],
        macs: Callable[..., int] | None = None,
        sampling: bool = False,
    ) -> None:
        """Register the operation.

        Args:
            name: as `use` and records name it.
            choices: from most to least wanted. The last is the reference and supports everything.
            macs: multiply-accumulates of a call in closed form. It is needed if a counter would
                see different work in different implementations.
            sampling: it only samples between pixels. Counters keep such work apart, for no
                convention that papers use has it.
        """
        self.name = name
        self.choices = {choice.name: replace(choice) for choice in choices}
        self.macs = macs
        self.sampling = sampling
        _ops[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        choice = self._pick(*args, **kwargs)
        # Nothing here reads this attribute, so a compiled graph sets it and does not depend on it.
        choice.ran = True
        for observer in _observers:
            observer(self.name, *args, **kwargs)
        if self.macs and _counters:
            with _counters[-1](self.macs(*args, **kwargs), self.sampling):
                return choice.run(*args, **kwargs)
        return choice.run(*args, **kwargs)

    def _pick(self, *args: Any, **kwargs: Any) -> Choice:
        forced = _forced.get(self.name)

        # A forced choice is never replaced in silence by another one.
        if forced:
            choice = self.choices[forced]
            if not choice.supports(*args, **kwargs):
                raise ValueError(
                    f"{self.name} was forced to {forced!r}, which is not installed "
                    "or does not take this device, dtype or bias"
                )
            return choice

        # Otherwise the first choice that fits and pays runs.
        for choice in self.choices.values():
            if choice.supports(*args, **kwargs) and choice.pays(*args, **kwargs):
                return choice
        raise AssertionError(f"the last choice of {self.name} refuses a call")


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Run every op that has `macs` inside `counter(macs, sampling)` while active.

    The counter adds the closed form and nothing that it sees inside.
    """
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.pop()


@contextmanager
def observing(observer: Callable[..., None]) -> Iterator[None]:
    """Call `observer(name, *args)` before every call of an op while active."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Force implementations by name while active, for example `use(attention="reference")`.

    Raises:
        ValueError: an op or an implementation is unknown; the message lists the known ones.
    """
    for name, choice in choices.items():
        if name not in _ops:
            raise ValueError(f"unknown kernel {name!r}; known: {', '.join(sorted(_ops))}")
        if choice not in _ops[name].choices:
            known = ", ".join(_ops[name].choices)
            raise ValueError(f"{name} has no implementation {choice!r}; known: {known}")

    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def references(instead_of: str | None = None) -> dict[str, str]:
    """Return the arguments of `use` that force references.

    Args:
        instead_of: a choice; ops without it are left alone. None: every op has its reference.
    """
    return {
        name: list(op.choices)[-1]
        for name, op in _ops.items()
        if instead_of is None or instead_of in op.choices
    }


def used() -> dict[str, list[str]]:
    """Return the implementations of each op that ran since `reset_used`.

    The replay of a CUDA graph runs no Python, so its implementations are not seen.
    """
    ran: dict[str, list[str]] = {}
    for name, op in sorted(_ops.items()):
        names = sorted(choice.name for choice in op.choices.values() if choice.ran)
        if names:
            ran[name] = names
    return ran


def reset_used() -> None:
    """Forget which implementations ran."""
    for op in _ops.values():
        for choice in op.choices.values():
            choice.ran = False
