"""Names of weights in the U-Nets of diffusers, and what they are in the networks here."""

from __future__ import annotations

import re
from typing import Protocol

# Names of diffusers outside of its blocks.
_OUTSIDE = {
    r"conv_in\.": "input_blocks.0.0.",
    r"conv_norm_out\.": "out.0.",
    r"conv_out\.": "out.2.",
    r"time_embedding\.linear_1\.": "time_embed.0.",
    r"time_embedding\.linear_2\.": "time_embed.2.",
    r"add_embedding\.linear_1\.": "label_emb.0.0.",
    r"add_embedding\.linear_2\.": "label_emb.0.2.",
    r"class_embedding\.": "label_emb.",
}
# Names of diffusers in a residual block; those in transformers are the same.
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class Levels(Protocol):
    """What the U-Nets here say of their levels."""

    num_res_blocks: int
    """Residual blocks of a level of the encoder."""

    depths: tuple[int, ...]
    """Transformers or attentions after each residual block, outermost level first; 0 for none."""


def own_name(name: str, levels: Levels) -> str:
    """Return the name here of a parameter of diffusers' U-Nets."""
    for pattern, own in _OUTSIDE.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name, count=1)
    if middle := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 2 * int(middle[2]) + (middle[1] == "attentions")
        return f"middle_block.{place}.{_inside(middle[3])}"

    # A level has one block more than residual blocks: the one that resamples, or joins it.
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if block is None:
        return name
    way, level, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    first = (levels.num_res_blocks + 1) * level + (way == "down")
    arm = "input_blocks" if way == "down" else "output_blocks"
    if kind == "resnets" or kind == "attentions":
        return f"{arm}.{first + index}.{int(kind == 'attentions')}.{_inside(rest)}"
    last = first + levels.num_res_blocks
    if kind == "downsamplers":
        return f"{arm}.{last}.0.{_inside(rest.replace('conv.', 'op.'))}"
    place = 1 + (levels.depths[len(levels.depths) - 1 - level] > 0)
    return f"{arm}.{last}.{place}.{_inside(rest)}"


def _inside(name: str) -> str:
    """Return the name here of what diffusers calls `name` inside a layer."""
    layer, _, rest = name.partition(".")
    return f"{_RESIDUAL.get(layer, layer)}.{rest}"
