"""Updates of all tensors of a network at once, in place: moving averages, and steps of AdamW."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.kernels import rows
from backbones.kernels.op import Choice, Op

Tensors = list[Tensor]


@dataclass(frozen=True)
class Rates:
    """The numbers of AdamW: learning rate, decays of both moments, epsilon, decay of weights."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float


def _supports(tensors: Tensors, others: Tensors, *args: Any) -> bool:
    """Tell whether the functions in C take the tensors: those of a pair lie alike, in one piece."""
    for x, other in zip(tensors, others, strict=True):
        is_plain = type(other) in (Tensor, torch.nn.Parameter) and x.dtype == other.dtype
        if not (is_plain and _lie_alike(x, other) and rows.fits(x)):
            return False
    return True


def _lie_alike(x: Tensor, other: Tensor) -> bool:
    if x.is_contiguous() and other.is_contiguous():
        return True
    layout = torch.channels_last
    return x.is_contiguous(memory_format=layout) and other.is_contiguous(memory_format=layout)


def _pays(*args: Any) -> bool:
    """Tell whether one call beats PyTorch's loops, which several threads share."""
    return torch.get_num_threads() == 1


def _addresses(tensors: Tensors) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def _call(name: str, lists: Sequence[Tensors], *args: Any) -> None:
    """Call a C function with lists of equally many tensors; the first list tells the sizes."""
    sizes = [x.numel() for x in lists[0]]
    numbers = (ctypes.c_long * len(sizes))(*sizes)
    addresses = map(_addresses, lists)
    rows.call(name, *addresses, numbers, len(sizes), *args, channels=tuple(sizes))


def _lerp(averages: Tensors, weights: Tensors, share: float) -> None:
    _call("lerp_tensors", (averages, weights), share)


# Move averages towards weights by a share of the distance.
lerp = Op(
    "lerp",
    [
        Choice("rows", _lerp, _supports, _pays),
        Choice("reference", torch._foreach_lerp_),
    ],
)


def _adamw_in_c(
    weights: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    steps: Tensors,
    bad: Tensor | None,
    rates: Rates,
) -> None:
    numbers = (rates.lr, rates.beta1, rates.beta2, rates.eps, rates.decay)
    _call("adamw_tensors", (weights, grads, means, squares, steps), bad, *numbers)


def _adamw(
    weights: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    steps: Tensors,
    bad: Tensor | None,
    rates: Rates,
) -> None:
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        *(weights, grads, means, squares, [], steps),
        lr=rates.lr,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=rates.decay,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
        found_inf=bad,
    )
    if bad is not None:
        torch._foreach_sub_(steps, [bad] * len(steps))


# Make a step of AdamW, unless `bad` is not zero. Every tensor has two moments and counts its steps.
adamw = Op(
    "adamw",
    [
        Choice("rows", _adamw_in_c, _supports, _pays),
        Choice("reference", _adamw),
    ],
)
