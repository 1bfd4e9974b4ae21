"""The parts of a network by name: its embedders, its blocks one by one, and its head."""

from __future__ import annotations

from torch import nn


def list_parts(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a network is made of, in the order of its constructor.

    Lists are opened, so each block stands for itself under the name of its weights, as `blocks.3`.
    """
    parts: dict[str, nn.Module] = {}
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList):
            parts |= {f"{name}.{inner}": part for inner, part in list_parts(module).items()}
        else:
            parts[name] = module
    return parts
