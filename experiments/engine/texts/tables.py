"""Tables of captions on disk, and how a network that reads text gets its own.

A folder of images whose labels are indices of captions holds the table as captions.safetensors:
`context` (M + 1, L, K) and perhaps `pooled` (M + 1, P), or `ids` (M + 1, L), and the hash of the
text encoder. The last row is the null caption's. Words of captions of digits are known without a
file, and the states of MS-COCO's captions stay on disk (`states.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

import backbones
from experiments.engine.data.captioned import grammar
from experiments.engine.data.captioned.folders import STATES as FILE
from experiments.engine.data.captioned.folders import is_coco
from experiments.engine.data.captioned.pictures import captions_folder
from experiments.engine.data.locate import folder_of
from experiments.engine.records.files import written_whole
from experiments.engine.specs.spec import Data
from experiments.engine.texts.sentences import load_sentence_encoder
from experiments.engine.texts.states import stored_table

TENSORS = ("context", "pooled", "ids")


def save_table(table: backbones.CaptionTable, folder: Path) -> None:
    """Write a table into a set's folder."""
    from safetensors.torch import save

    tensors = {
        name: getattr(table, name).contiguous()
        for name in TENSORS
        if getattr(table, name) is not None
    }
    with written_whole(folder / FILE) as file:
        file.write(save(tensors, metadata={"encoder": table.encoder}))


def prepare_table(encoder: Path, data: Data, folder: Path | None) -> str:
    """Encode the captions of digits into their set's folder, and say what lies there.

    Args:
        encoder: Folder or file of a sentence encoder.
        data: The set.
        folder: Where the table goes; None: where runs look for it.

    Raises:
        ValueError: The encoder is damaged or of another kind, the captions are not for it, or the
            folder holds the table of another encoder.
    """
    folder = folder_of(data) if folder is None else folder
    sentences = load_sentence_encoder(encoder)
    if not (folder / FILE).is_file():
        texts = [caption.text for caption in grammar.captions_of(data.name)]
        save_table(sentences.table(texts, grammar.TOKENS), folder)
    table = read_table(folder)
    if table.encoder != sentences.name:
        raise ValueError(
            f"{folder / FILE} is of the encoder {table.encoder}, not of {sentences.name}; remove "
            "the file, or name another folder ($DICO_DATA)"
        )

    # Other encoders serve studies, which declare them.
    _, tokens, dim = table.shape
    text = f"{len(table)} captions, {tokens} tokens of width {dim} by {table.encoder}"
    if table.encoder != data.captions:
        text += (
            f"\nwarning: the protocols take states of {data.captions}; a run on these declares "
            f"Data(captions={table.encoder!r})"
        )
    return text


def read_table(folder: Path) -> backbones.CaptionTable:
    """Read the table of a set's folder.

    Raises:
        ValueError: The file is missing, is damaged, or holds no table.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            encoder = (file.metadata() or {}).get("encoder", "")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: no readable table of captions ({str(error).splitlines()[0]}); "
            "make it with save_table from the states of a text encoder"
        ) from None
    if unknown := sorted(tensors.keys() - set(TENSORS)):
        raise ValueError(f"{path}: unknown tensors {', '.join(unknown)}; known: {TENSORS}")
    return backbones.CaptionTable(**tensors, encoder=encoder)


def table_of(data: Data) -> backbones.CaptionTable:
    """Return the table of a set's captions: ids of words for digits, else that of its folder.

    Raises:
        ValueError: The table is missing or damaged, or the set has no pooled vectors.
    """
    if data.pooled and (data.name not in grammar.NAMES or data.captions == grammar.VOCABULARY):
        raise ValueError(
            f"set {data.name} has no pooled vectors in place of states; only digits whose captions "
            "are states of a sentence encoder do"
        )
    if is_coco(data):
        return stored_table(captions_folder())
    if data.name not in grammar.NAMES:
        return read_table(folder_of(data))
    if data.captions != grammar.VOCABULARY:
        table = read_table(folder_of(data))
        return _repeat_pooled(table) if data.pooled else replace(table, pooled=None)
    vocabulary = backbones.Vocabulary(grammar.WORDS)
    texts = [caption.text for caption in grammar.captions_of(data.name)]
    ids = vocabulary.encode(texts, grammar.TOKENS)
    return backbones.CaptionTable(ids=ids, encoder=vocabulary.digest())


def _repeat_pooled(table: backbones.CaptionTable) -> backbones.CaptionTable:
    """Give every token its caption's pooled vector of length 1, times sqrt(K): (M + 1, L, K)."""
    if table.pooled is None:
        raise ValueError(
            "the table of captions holds no pooled vectors; remove it and prepare it again"
        )
    _, tokens, dim = table.shape
    repeated = (table.pooled * dim**0.5)[:, None].repeat(1, tokens, 1)
    return replace(table, context=repeated, pooled=None)


def give_captions(model: nn.Module, data: Data) -> None:
    """Give a network that reads text the captions of its data; other networks read labels.

    Raises:
        ValueError: The data declare no captions, or their table is not what the network reads.
    """
    if not isinstance(model, backbones.TextNetwork):
        return
    if not data.captions:
        raise ValueError(
            f"{type(model).__name__} reads captions, and set {data.name} declares none: name the "
            "text encoder of its table (Data.captions), or choose a network that reads labels"
        )
    if model.captions.table is None:
        device = next(model.parameters()).device
        model.captions.give(table_of(data), data.captions)
        model.captions.to(device)


def identify_captions(model: nn.Module) -> dict[str, str]:
    """Return what identifies the captions of a network, for records."""
    if not isinstance(model, backbones.TextNetwork) or model.captions.table is None:
        return {}
    return {"captions_sha256": model.captions.table.digest()}
