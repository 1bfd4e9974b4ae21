"""Tensors that the processes of a group share: each holds a part of the first dimension.

PyTorch calls them DTensors. A plain tensor counts as one that this process holds whole.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_part(x: Tensor | None) -> TypeGuard[DTensor]:
    """Return whether a tensor is shared.

    Only a process that has imported DTensor's module can hold one. That import takes a second, so
    it is not made here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@torch.no_grad()
def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of each tensor, in the same memory."""
    return [x.to_local() if is_part(x) else x for x in tensors]


def make_whole(x: Tensor) -> Tensor:
    """Return a whole tensor. All processes call this, in the same order of tensors."""
    return x.full_tensor() if is_part(x) else x


def take_part(whole: Tensor, like: Tensor | None) -> Tensor:
    """Return of a whole tensor what this process holds of another of its shape."""
    if not is_part(like) or is_part(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(part)


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each whole tensor, (K,). All processes call this.

    Args:
        tensors: all of them shared by the same processes, or all of them plain.
    """
    norms = torch.stack(torch._foreach_norm(own_parts(tensors)))
    first = tensors[0]
    if not is_part(first):
        return norms
    squares = norms.double().square()
    dist.all_reduce(squares, group=first.device_mesh.get_group())
    return squares.sqrt().to(norms.dtype)


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return whether all values of each whole tensor are finite, with tensors as `norms_of`."""
    bad = torch.stack([(~x.isfinite()).any() for x in own_parts(tensors)]).float()
    first = tensors[0]
    if is_part(first):
        dist.all_reduce(bad, group=first.device_mesh.get_group())
    return (bad == 0).tolist()


def map_tensors(value: Any, function: Callable[[Tensor, Any], Any], beside: Any = None) -> Any:
    """Return nested dictionaries, lists and tuples with a function's values for their tensors.

    Args:
        value: what is nested.
        function: takes a tensor, and what lies in its place in `beside`; None if nothing does.
        beside: nested dictionaries too.
    """
    if isinstance(value, Tensor):
        return function(value, beside)
    if isinstance(value, dict):
        others = beside if isinstance(beside, dict) else {}
        # A plain copy keeps the version numbers that a state_dict carries as an attribute.
        result = copy.copy(value)
        for name, item in value.items():
            result[name] = map_tensors(item, function, others.get(name))
        return result
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def gather_state(state: dict[str, Any], keeps: bool) -> dict[str, Any]:
    """Return a nested state with whole tensors, those that were shared in host memory.

    Args:
        state: of this process. All processes call this.
        keeps: whether this process wants the result; the others get {}.
    """

    def gather(x: Tensor, _: Any) -> Tensor | None:
        if not is_part(x):
            return x
        whole = make_whole(x)
        return whole.cpu() if keeps else None

    whole = map_tensors(state, gather)
    return whole if keeps else {}


def part_state(state: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Return of a nested state what this process holds of one like it."""
    return map_tensors(state, take_part, like)
