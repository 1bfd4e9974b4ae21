"""Networks of which every process keeps a part: PyTorch's fully_shard, block by block."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from experiments.engine.numerics.recompute import find_blocks


def shard_network(network: nn.Module, device: torch.device, entry: nn.Module | None = None) -> None:
    """Keep of every parameter this process's part alone, on a device.

    A block's parameters are whole while it runs, and those of what is no block during the whole
    step. Gradients are averaged over the processes. A network without blocks is one block.

    Args:
        network: whole, wherever it lies; its blocks go to the device one by one.
        device: of the parts.
        entry: what calls the network; None: the network itself.

    Raises:
        ValueError: a parameter is a single number, which cannot be cut.
    """
    from torch.distributed.fsdp import fully_shard

    names = [name for name, p in network.named_parameters() if p.dim() == 0]
    if names:
        raise ValueError(
            f"{names[0]} of {type(network).__name__} is a single number, which cannot be cut into "
            "parts; leave out fully_shard, or take shard_optimizer"
        )

    # Parts follow each other in memory, so weights cannot lie channels last; activations still do.
    entry = entry or network
    entry.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network.register_forward_pre_hook(_put_channels_last)

    # From the inside out: what is cut already is left out around it.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in list_sharded(network):
        fully_shard(module, mesh=mesh)
    fully_shard(entry, mesh=mesh)


def list_sharded(network: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are whole only while they run, from the inside out.

    These are the blocks, and what is called while the block around it does not run. A module names
    such children in `called_apart`; a list stands for its members.
    """
    apart: list[nn.Module] = []
    for module in network.modules():
        for name in getattr(module, "called_apart", ()):
            child = getattr(module, name)
            if child is not None:
                apart += child if isinstance(child, nn.ModuleList) else [child]
    return [*apart, *find_blocks(network)]


def _put_channels_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if _is_map(x) else x for x in inputs
    )


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4
