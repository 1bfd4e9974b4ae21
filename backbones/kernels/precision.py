"""Arithmetic of the recurrences: at least float32, whatever autocast or the inputs say."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cast real tensors up to float32 (float64 stays) outside autocast, and the result to the first one's dtype."""

    @functools.wraps(run)
    def wrapped(*args: Tensor) -> Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in args)).to(
                args[0].dtype
            )

    return wrapped
