"""DiT's weights in the form of the diffusers library, in both directions. Needs no diffusers.

Diffusers' DiTTransformer2DModel is DiT's network with other numerics: its sinusoid of time divides
exponents by 127 where the authors divide by 128, and the norm before its MLP has eps 1e-5 where
theirs has 1e-6. A folder that was exported here says in its config that it was trained with the
authors' numerics. Every other folder is taken as trained with diffusers'.

Source: diffusers 0.42.1 and github.com/facebookresearch/DiT at ed81ce2.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from backbones.checkpoint import read_weights
from backbones.dit import DiT

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# What a pipeline's folder calls the part that is its network.
PARTS = ("transformer", "unet")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Where the config says with which numerics the weights were trained.
NUMERICS = "_trained_as"
AUTHORS = "facebookresearch/DiT"
WARNING = (
    "diffusers computes the sinusoid of time otherwise than the network that these weights are of, "
    "and its outputs differ; set time_proj.downscale_freq_shift = 0 in every block after loading"
)
# The numerics that diffusers has no choice of, and its eps where a config says none.
DIVISOR = 127
AUTHORS_DIVISOR = 128
DEFAULT_EPS = 1e-5

# DiTPipeline's scheduler: DDIM over DiT's betas.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}

# Beginnings of names: the authors' and diffusers'. Every block of diffusers has its embedders.
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # thirds of the rows of the authors' qkv
KINDS = ("weight", "bias")


def to_diffusers(model: DiT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a network's weights under diffusers' names, and the config of its folder."""
    state = model.state_dict()
    weights = {
        f"{theirs}.{kind}": state[f"{ours}.{kind}"]
        for ours, theirs in ENDS.items()
        for kind in KINDS
    }
    for index in range(len(model.blocks)):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        for name, value in state.items():
            parent, _, kind = name.rpartition(".")
            if parent in EMBEDDERS:
                weights[f"{theirs}.{EMBEDDERS[parent]}.{kind}"] = value.clone()
            part = parent.removeprefix(f"{ours}.")
            if parent.startswith(f"{ours}.") and part in BLOCK:
                weights[f"{theirs}.{BLOCK[part]}.{kind}"] = value

        # Queries, keys and values lie one below the other.
        for kind in KINDS:
            thirds = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, third in zip(PROJECTIONS, thirds, strict=True):
                weights[f"{theirs}.{name}.{kind}"] = third.clone()
    return {name: value.contiguous() for name, value in weights.items()}, _config_of(model)


def write_pipeline(model: DiT, folder: Path) -> list[str]:
    """Write a folder that DiTPipeline loads beside a VAE; return warnings. All of it or nothing.

    The scheduler is DDIM with DiT's betas. Classes are named by their numbers.
    """
    from safetensors.torch import save_file

    weights, config = to_diffusers(model)
    labels = {str(index): str(index) for index in range(model.num_classes)}
    index = {
        "_class_name": "DiTPipeline",
        "id2label": labels,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", CLASSES[0]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    parts = {
        "model_index.json": index,
        "transformer/config.json": config,
        "scheduler/scheduler_config.json": SCHEDULER,
    }

    # Everything is written beside the folder, which then takes its name.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = Path(temporary) / folder.name
        for name, content in parts.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
        save_file(weights, unfinished / "transformer" / WEIGHTS, metadata={"format": "pt"})
        unfinished.rename(folder)
    return [WARNING] if NUMERICS in config else []


def _config_of(model: DiT) -> dict[str, Any]:
    attention = cast(Any, model.blocks[0]).attn
    config: dict[str, Any] = {
        "_class_name": CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.dim // attention.heads,
        "dropout": 0.0,
        "in_channels": model.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": model.mlp_norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": attention.heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": len(model.blocks),
        "out_channels": model.out_channels,
        "patch_size": model.patch,
        "sample_size": model.input_size,
        "upcast_attention": False,
    }
    if model.time_divisor != DIVISOR:
        config[NUMERICS] = AUTHORS
    return config


def from_diffusers(folder: Path) -> tuple[DiT, dict[str, Tensor]]:
    """Build the network of a diffusers folder; return it with its weights by the authors' names.

    Args:
        folder: of the transformer, or of a pipeline that holds one.

    Raises:
        ValueError: in one line, if the folder holds another model, or the blocks' embedders differ.
    """
    folder = part_in(folder)
    config = _read_dit_config(folder)
    stored, _ = read_weights(folder / WEIGHTS)
    model = _build(config)

    # Every block has the same embedders; the authors' network has them once.
    state = {"pos_embed": model.pos_embed.detach().clone()}
    for ours, theirs in ENDS.items():
        for kind in KINDS:
            state[f"{ours}.{kind}"] = _take(stored, f"{theirs}.{kind}")
    for index in range(len(model.blocks)):
        parent = f"transformer_blocks.{index}"
        for ours, theirs in BLOCK.items():
            for kind in KINDS:
                state[f"blocks.{index}.{ours}.{kind}"] = _take(stored, f"{parent}.{theirs}.{kind}")
        for kind in KINDS:
            thirds = [_take(stored, f"{parent}.{name}.{kind}") for name in PROJECTIONS]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(thirds)
        _take_embedders(stored, parent, state)
    if stored:
        raise ValueError(f"{folder.name}: unexpected weights, such as {min(stored)}")
    return model, state


def read_numerics(folder: Path) -> dict[str, float]:
    """Return the options of a DiT that say with which numerics a folder's network was trained.

    Raises:
        ValueError: in one line, if the folder holds another model.
    """
    return _numerics_of(_read_dit_config(part_in(folder)))


def part_in(folder: Path) -> Path:
    """Return the folder of the network: of a pipeline the part, or else the folder itself."""
    return next((folder / part for part in PARTS if (folder / part).is_dir()), folder)


def class_in(folder: Path) -> str:
    """Return the library's name of the class of network that a folder holds.

    Raises:
        ValueError: in one line, if the folder has no config or the config names none.
    """
    return str(read_config(part_in(folder))["_class_name"])


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a network's folder.

    Raises:
        ValueError: in one line, if it cannot be read, or names no class.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        config = None
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{path} is no config of the diffusers library: it lacks _class_name")
    return config


def _take_embedders(stored: dict[str, Tensor], parent: str, state: dict[str, Tensor]) -> None:
    for ours, theirs in EMBEDDERS.items():
        for kind in KINDS:
            if ours.startswith("y_") and kind == "bias":
                continue
            value = _take(stored, f"{parent}.{theirs}.{kind}")
            known = state.setdefault(f"{ours}.{kind}", value)
            if not torch.equal(known, value):
                raise ValueError(
                    f"{parent}.{theirs}.{kind} differs from block 0's: the blocks were trained "
                    "apart, and are no DiT"
                )


def _take(stored: dict[str, Tensor], name: str) -> Tensor:
    if name not in stored:
        raise ValueError(f"no weights {name}: this is no DiT of the diffusers library")
    return stored.pop(name)


def _read_dit_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    norm = config.get("norm_type", "ada_norm_zero")
    if config["_class_name"] not in CLASSES or norm != "ada_norm_zero":
        raise ValueError(
            f"{folder / 'config.json'} is not that of a DiT; it must be of {' or '.join(CLASSES)}"
        )
    return config


def _build(config: dict[str, Any]) -> DiT:
    needed = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"config.json of a DiT lacks {', '.join(missing)}")

    # What a config leaves out has diffusers' default.
    heads, channels = config["num_attention_heads"], config["in_channels"]
    with torch.random.fork_rng(devices=[]):
        return DiT(
            input_size=config.get("sample_size", 32),
            in_channels=channels,
            num_classes=config.get("num_embeds_ada_norm", 1000),
            learn_sigma=(config.get("out_channels") or channels) == 2 * channels,
            patch=config.get("patch_size", 2),
            dim=heads * config["attention_head_dim"],
            depth=config["num_layers"],
            heads=heads,
            **_numerics_of(config),
        )


def _numerics_of(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "time_divisor": AUTHORS_DIVISOR if config.get(NUMERICS) == AUTHORS else DIVISOR,
        "mlp_norm_eps": config.get("norm_eps", DEFAULT_EPS),
    }
