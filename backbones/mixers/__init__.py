"""Token mixers with one signature: `Mixer(dim, size=(H, W), index=block, **options)`.

A mixer maps (N, C, H, W) to the same shape. `size` is the grid of the stage and `index` the block's
place in it: window attention shifts the odd blocks. A new mixer is a file in this folder and a line
in MIXERS. A file outside this tree calls `register_mixer`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from backbones.mixers.agent import AgentAttention
from backbones.mixers.conv import ConvModule
from backbones.mixers.focused_linear import FocusedLinearAttention
from backbones.mixers.global_regional import GlobalRegionalAttention
from backbones.mixers.softmax import SoftmaxAttention
from backbones.mixers.window import WindowAttention

MIXERS: dict[str, type[nn.Module]] = {
    "agent": AgentAttention,
    "conv": ConvModule,
    "focused_linear": FocusedLinearAttention,
    "global_regional": GlobalRegionalAttention,
    "softmax": SoftmaxAttention,
    "window": WindowAttention,
}


def register_mixer(name: str, cls: type[nn.Module]) -> None:
    """Let the stacks with a swappable mixer build this one by a name.

    Raises:
        ValueError: For a name that a mixer has already.
    """
    if name in MIXERS:
        raise ValueError(f"mixer {name!r} is registered twice; choose another name")
    MIXERS[name] = cls


def build_mixer(
    name: str, dim: int, size: tuple[int, int], index: int, **options: Any
) -> nn.Module:
    """Build a mixer by name.

    Raises:
        ValueError: For an unknown name or option, with the known ones, and for a missing option.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(sorted(MIXERS))}")
    parameters = inspect.signature(MIXERS[name].__init__).parameters
    known = set(parameters) - {"self", "dim", "size", "index"}
    required = {option for option in known if parameters[option].default is inspect.Parameter.empty}

    if unknown := sorted(set(options) - known):
        listed = ", ".join(sorted(known))
        raise ValueError(f"mixer {name} has no option {', '.join(unknown)}; known: {listed}")
    if missing := sorted(required - set(options)):
        raise ValueError(f"mixer {name} needs {', '.join(missing)}")
    return MIXERS[name](dim, size=size, index=index, **options)
