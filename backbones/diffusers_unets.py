"""U-Nets in the form of the diffusers library, read into the networks here. Needs no diffusers.

| diffusers | here |
|---|---|
| UNet2DConditionModel | the U-Nets of Stable Diffusion; LDM, whose label table no folder holds |
| UNet2DModel of ADM's blocks | ADM |

A folder's config must say the network that it is read into, since no tensor tells heads or norms.
What a config leaves out has diffusers' default. Source: diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.adm import ADM
from backbones.checkpoint import read_weights
from backbones.diffusers_format import WEIGHTS, class_in, part_in, read_config
from backbones.ldm import LDM
from backbones.text_unet import SIZES, TextUNet
from backbones.unet import UNet
from backbones.unet_names import own_name

CONDITIONAL, PLAIN = "UNet2DConditionModel", "UNet2DModel"
CLASSES = (CONDITIONAL, PLAIN)

# Fields that change no number of a network in fp32, or are its data's.
UNREAD = (
    "sample_size",
    "dropout",
    "upcast_attention",
    "num_train_timesteps",
    "num_class_embeds",
    "addition_embed_type_num_heads",
)
# Diffusers' defaults of fields that say a network's shape.
DEFAULTS: dict[str, dict[str, Any]] = {
    CONDITIONAL: {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 1280,
        "use_linear_projection": False,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
    },
    PLAIN: {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        "attention_head_dim": 8,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "resnet_time_scale_shift": "default",
        "add_attention": True,
    },
}
# Fields whose default is all that the networks here have. Other fields must be empty.
ONLY = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
}
# How many fields a message names.
NAMED = 3


def read_unet(folder: Path, model: LDM | TextUNet | ADM) -> dict[str, Tensor]:
    """Read a U-Net's folder for a network, under the network's own names.

    Args:
        folder: of the U-Net, or of a pipeline that holds one.
        model: the network.

    Raises:
        ValueError: in one line, if the folder's config says another network.
    """
    kind = CONDITIONAL if isinstance(model, UNet) else PLAIN
    found = class_in(folder)
    if found != kind:
        raise ValueError(
            f"{folder.name} holds a {found}, and {type(model).__name__} is read from a {kind}; "
            "name the network that the folder holds"
        )
    needed = _needed_of_adm(model) if isinstance(model, ADM) else _needed_of_transformers(model)
    part = part_in(folder)
    _require(read_config(part), DEFAULTS[kind], needed, folder.name)
    stored, _ = read_weights(part / WEIGHTS)
    if isinstance(model, ADM):
        stored = _join_attentions(stored, model)
    return {own_name(name, model): value for name, value in stored.items()}


def _needed_of_transformers(model: LDM | TextUNet) -> dict[str, Any]:
    """Return the fields of a UNet2DConditionModel that computes what a network here does."""
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in model.depths]

    # The middle has the heads of the innermost level.
    middle = model.middle_depth
    depths = [depth or None for depth in model.depths]
    if middle is not None:
        depths[-1] = middle
    heads = zip(model.level_heads, depths, strict=True)

    # SDXL embeds the pooled caption and the sizes together.
    pooled = model.captions.pooled_dim if isinstance(model, TextUNet) else None
    size_dim = model.size_dim if isinstance(model, TextUNet) and pooled else None
    return _shape_of(model) | {
        "down_block_types": tuple(kinds),
        "mid_block_type": None if middle is None else "UNetMidBlock2DCrossAttn",
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        "attention_head_dim": tuple(number if depth else None for number, depth in heads),
        "transformer_layers_per_block": tuple(depths),
        "cross_attention_dim": model.context_dim,
        "use_linear_projection": isinstance(model, TextUNet) and model.linear,
        "addition_embed_type": "text_time" if pooled else None,
        "addition_time_embed_dim": size_dim,
        "projection_class_embeddings_input_dim": pooled and pooled + SIZES * (size_dim or 0),
        "resnet_time_scale_shift": "default",
    }


def _needed_of_adm(model: ADM) -> dict[str, Any]:
    """Return the fields of a UNet2DModel that computes what ADM does."""
    kinds = ["AttnDownBlock2D" if depth else "ResnetDownsampleBlock2D" for depth in model.depths]
    ups = ["AttnUpBlock2D" if depth else "ResnetUpsampleBlock2D" for depth in model.depths]

    # The middle always attends. This class counts the channels of a head; the other class counts
    # heads under the same name.
    attends = [*model.depths[:-1], 1]
    per_head = [
        width // heads if attend else None
        for width, heads, attend in zip(model.widths, model.level_heads, attends, strict=True)
    ]
    return _shape_of(model) | {
        "down_block_types": tuple(kinds),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": tuple(reversed(ups)),
        "attention_head_dim": tuple(per_head),
        "attn_norm_num_groups": 32,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": True,
    }


def _shape_of(model: LDM | TextUNet | ADM) -> dict[str, Any]:
    return {
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "block_out_channels": tuple(model.widths),
        "layers_per_block": model.num_res_blocks,
    }


def _require(
    config: Mapping[str, Any], defaults: Mapping[str, Any], needed: Mapping[str, Any], file: str
) -> None:
    """Raise ValueError, in one line, unless a config says the needed network."""
    differing = [
        f"{name} {_plain(config.get(name, defaults[name]))}, not {value}"
        for name, value in needed.items()
        if not _agree(config.get(name, defaults[name]), value)
    ]

    # What nothing here computes must be as it is without it.
    for name, value in config.items():
        if name in defaults or name in UNREAD or name.startswith("_"):
            continue
        if (_single(value) or None) != (ONLY.get(name) or None):
            differing.append(f"{name} {_plain(value)}, which no network here has")
    if differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        raise ValueError(
            f"{file}/config.json is of another network: {'; '.join(differing[:NAMED])}{more}; "
            "declare the network that the folder holds"
        )


def _agree(value: Any, needed: Any) -> bool:
    """Tell whether a field says what is needed: one value for all levels, or one for each."""
    if not isinstance(needed, tuple):
        return bool(_single(value) == needed)
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * len(needed)
    pairs = list(zip(values, needed, strict=False))
    return len(values) == len(needed) and all(ours in (None, theirs) for theirs, ours in pairs)


def _single(value: Any) -> Any:
    """Return the value that all levels share."""
    shared = isinstance(value, list | tuple) and len({*map(str, value)}) == 1
    return value[0] if shared else value


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _join_attentions(stored: dict[str, Tensor], model: ADM) -> dict[str, Tensor]:
    """Return ADM's weights with queries, keys and values in one layer, still by diffusers' names.

    Diffusers' layers are linear, ADM's are convolutions of length 1. The legacy order lays the
    three parts of a head side by side.
    """
    heads = dict(zip(model.widths, model.level_heads, strict=True))
    axis = 1 if model.order == "legacy" else 0
    joined: dict[str, Tensor] = {}
    for name, value in stored.items():
        parent, _, part = name.partition(".to_q.")
        if part:
            thirds = [stored[f"{parent}.to_{letter}.{part}"] for letter in "qkv"]
            split = (heads.get(len(value), 1), -1)
            qkv = torch.stack([third.unflatten(0, split) for third in thirds], dim=axis)
            value = qkv.flatten(0, 2)
            joined[f"{parent}.qkv.{part}"] = value[..., None] if part == "weight" else value
        elif ".to_out.0." in name:
            shaped = value[..., None] if name.endswith("weight") else value
            joined[name.replace("to_out.0", "proj_out")] = shaped
        elif ".to_k." not in name and ".to_v." not in name:
            joined[name.replace(".group_norm.", ".norm.")] = value
    return joined
