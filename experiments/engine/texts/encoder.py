"""A CLIP text encoder from a folder: its weights, its tokens, and the name that sets declare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backbones
from experiments.engine.machine.system_errors import naming
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.records.files import file_sha256, read_json
from experiments.engine.texts.tokenizer import Tokenizer, find_merges

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Published files of weights by their SHA-256, which other projects record of OpenAI's repository on
# the hub, and the vocabulary that belongs to them.
PUBLISHED = {
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "clip-vit-large-patch14",
}
VOCABULARY = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


class TextEncoder:
    """Frozen, in fp32.

    name: what sets declare in `Data.captions`: a published name, or the hash of the weights.
    identity: what identifies it in manifests.
    tokens, dim: of the states of a caption.
    """

    def __init__(
        self,
        network: backbones.ClipText,
        tokenizer: Tokenizer,
        published: str | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.tokens = network.tokens
        self.dim = network.dim
        weights = digest(network)
        self.name = published or weights
        self.identity: dict[str, Any] = {
            "name": self.name,
            "weights": weights,
            "vocabulary": tokenizer.sha256,
        }

    def length(self, text: str) -> int:
        """Return the number of a text's tokens, begin and end among them."""
        return len(self.tokenizer.tokens(text)) + 2

    @torch.inference_mode()
    def states(self, texts: Sequence[str], batch: int) -> Tensor:
        """Return the states (n, L, K) of texts, float32 on the CPU, of all L tokens.

        Every pass has `batch` rows, the last one filled up, so that no bit depends on how many
        texts come at a time.
        """
        ids = torch.from_numpy(np.stack([self.tokenizer.encode(t, self.tokens) for t in texts]))
        parts = []
        for rows in ids.split(batch):
            padded = torch.cat([rows, rows[-1:].expand(batch - len(rows), -1)]).to(self.device)
            with precision("fp32", self.device):
                parts.append(self.network(padded)[: len(rows)].cpu())
        return torch.cat(parts)


def load_text_encoder(folder: Path, device: torch.device | str = "cpu") -> TextEncoder:
    """Load a CLIP text encoder from a folder of transformers' form.

    Raises:
        ValueError: A file is missing or damaged, or the folder is of another kind of encoder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"text encoder {folder} lacks {' and '.join(missing)}; name a folder that holds "
            f"{CONFIG}, {WEIGHTS} and the vocabulary, such as a copy of "
            "openai/clip-vit-large-patch14"
        )
    network = _network_of(folder / CONFIG)
    try:
        with naming("read", folder / WEIGHTS):
            stored = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS}: damaged or cut short ({reason})") from None
    network.load_stored(stored, str(folder / WEIGHTS))
    backbones.check_values(network, network.state_dict(), f"text encoder {folder.name}")

    # Published weights read the published vocabulary.
    tokenizer = Tokenizer(find_merges(folder), network.vocabulary)
    published = PUBLISHED.get(file_sha256(folder / WEIGHTS))
    if published and tokenizer.sha256 != VOCABULARY:
        raise ValueError(
            f"{folder} holds the weights of {published} with another vocabulary "
            f"({tokenizer.sha256[:16]}); copy its merges.txt again"
        )
    return TextEncoder(network, tokenizer, published, device)


def _network_of(path: Path) -> backbones.ClipText:
    """Build the network of a config.json, of the encoder alone or of the whole of CLIP."""
    config = read_json(path, "copy the text encoder again")
    try:
        config = config.get("text_config") or config
        return backbones.ClipText(
            vocabulary=int(config.get("vocab_size", 49_408)),
            tokens=int(config.get("max_position_embeddings", 77)),
            dim=int(config["hidden_size"]),
            depth=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            hidden=int(config["intermediate_size"]),
            activation=config.get("hidden_act", "quick_gelu"),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} describes no CLIP text encoder ({type(error).__name__}: {error}); copy it "
            "again"
        ) from None
