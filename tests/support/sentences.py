"""A small sentence encoder of BERT's form, randomly initialised."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from backbones import Bert
from experiments.engine.data.captioned.grammar import DIGITS

# Every word but "above" is whole.
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "left", "of", "abo", "##ve", "##s")
WORDS = (*PIECES, *DIGITS, "cafe")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}


def write_sentence_encoder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write an encoder in transformers' form, with a pooler and ids of positions beside it."""
    folder.mkdir()
    config = CONFIG | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Bert(
            vocabulary=config["vocab_size"],
            tokens=config["max_position_embeddings"],
            dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
        )
    beside = {"pooler.dense.bias": torch.ones(12), "embeddings.position_ids": torch.arange(11)}
    save_file(network.state_dict() | beside, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return folder
