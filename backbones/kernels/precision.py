"""The arithmetic of the recurrences: at least float32, whatever autocast or the inputs say."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a function outside autocast on inputs of float32 or better.

    Lower dtypes are cast up, and float64 stays. The result has the first input's dtype.
    """

    @functools.wraps(function)
    def wrapped(*args: Tensor) -> Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            exact = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in args)
            return function(*exact).to(args[0].dtype)

    return wrapped
