"""Token mixers with one signature: `Mixer(dim, size=(H, W), index=block, **options)`, (N, C, H, W) -> (N, C, H, W).

`size` is the grid of the stage and `index` the block's place in it (window attention shifts the odd ones).
To add one: a file beside this one, and a line in MIXERS.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from backbones.mixers.agent import AgentAttention
from backbones.mixers.conv import ConvModule
from backbones.mixers.focused_linear import FocusedLinearAttention
from backbones.mixers.softmax import SelfAttention
from backbones.mixers.window import WindowAttention

MIXERS: dict[str, type[nn.Module]] = {
    "agent": AgentAttention,
    "conv": ConvModule,
    "focused_linear": FocusedLinearAttention,
    "softmax": SelfAttention,
    "window": WindowAttention,
}


def build_mixer(
    name: str, dim: int, size: tuple[int, int], index: int, **options: Any
) -> nn.Module:
    """Build a mixer by name; ValueError lists the known names or options."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(sorted(MIXERS))}")
    parameters = inspect.signature(MIXERS[name].__init__).parameters
    known = set(parameters) - {"self", "dim", "size", "index"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"mixer {name} has no option {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    if missing := sorted(
        option
        for option in known - set(options)
        if parameters[option].default is inspect.Parameter.empty
    ):
        raise ValueError(f"mixer {name} needs {', '.join(missing)}")
    return MIXERS[name](dim, size=size, index=index, **options)
