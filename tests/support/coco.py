"""A few pictures with captions in MS-COCO's form, and a small CLIP text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from backbones import ClipText
from tests.support.latent_sets import SIZES, picture

# Merges of small words; ids follow 512 characters, and begin and end come last.
MERGES = ("a t</w>", "c at</w>", "d o", "do g</w>", "t h", "th e</w>", "r e", "re d</w>")
CONFIG = {
    "vocab_size": 512 + len(MERGES) + 2,
    "max_position_embeddings": 9,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "hidden_act": "quick_gelu",
}
TRAIN = {
    "b.jpg": ["a red cat", "the cat", "cat"],
    "a.jpg": ["the dog", "a dog at a cat"],
    "c.jpg": ["red", "a red dog"],
    "d.jpg": ["dog cat", "cat dog"],
}
VALIDATION = {f"v{number}.jpg": [f"the cat {number}", f"the dog {number}"] for number in range(3)}
NUM_CAPTIONS = 15


def write_annotations(path: Path, captions: dict[str, list[str]]) -> Path:
    """Write a file of annotations, whose pictures and captions are in no order."""
    images = [{"id": 7 * number, "file_name": name} for number, name in enumerate(captions)]
    annotations = [
        {"id": 100 * place + number, "image_id": 7 * number, "caption": f" {text}\n"}
        for number, texts in enumerate(captions.values())
        for place, text in enumerate(texts)
    ]
    path.write_text(json.dumps({"images": images[::-1], "annotations": annotations[::-1]}))
    return path


def write_images(folder: Path, names: Iterable[str]) -> Path:
    """Write a picture of an odd size under each name."""
    folder.mkdir()
    for number, name in enumerate(names):
        picture(number, *SIZES[number % len(SIZES)]).save(folder / name)
    return folder


def write_encoder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a randomly initialised text encoder in transformers' form, inside a whole CLIP."""
    folder.mkdir()
    config = CONFIG | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClipText(
            vocabulary=config["vocab_size"],
            tokens=config["max_position_embeddings"],
            dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
        )
    weights = {f"text_model.{name}": value for name, value in network.state_dict().items()}
    beside = {"logit_scale": torch.ones(1), "vision_model.x": torch.ones(2)}
    save_file(weights | beside, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": config}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder
