"""Trade memory for time: the backward pass computes the insides of blocks again."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> None:
    """Keep of every block its inputs alone, and compute the rest again for the gradients.

    A block is a member of a list of modules that can be called. Gradients stay the same to the last
    bit, since networks draw no random numbers.

    Raises:
        ValueError: the network has no list of blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks to compute again; leave out recompute"
        )
    for block in blocks:
        forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward


def find_blocks(module: nn.Module, listed: bool = False) -> list[nn.Module]:
    """Return the outermost blocks below a module; `listed` tells whether a list holds it."""
    # A dictionary in a list only names a block.
    holds = isinstance(module, nn.ModuleList) or (listed and isinstance(module, nn.ModuleDict))
    if listed and not holds:
        return [module]
    return [block for child in module.children() for block in find_blocks(child, holds)]
