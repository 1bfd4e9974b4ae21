"""Tables of captions on disk, and how a network that reads text gets its own.

A folder of images whose labels are indices of captions holds the table as captions.safetensors:
`context` (M + 1, L, K) and perhaps `pooled` (M + 1, P), or `ids` (M + 1, L), and the hash of the
text encoder. The last row is the null caption's. Captions of digits are known without a file, and
the states of MS-COCO's captions stay on disk (`states.py`).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

import backbones
from experiments.engine.data.captioned import grammar
from experiments.engine.data.captioned.folders import is_coco
from experiments.engine.data.captioned.pictures import captions_folder
from experiments.engine.data.locate import folder_of
from experiments.engine.specs.spec import Data
from experiments.engine.texts.states import stored_table

FILE = "captions.safetensors"
TENSORS = ("context", "pooled", "ids")


def save_table(table: backbones.CaptionTable, folder: Path) -> None:
    """Write a table into a set's folder."""
    from safetensors.torch import save_file

    tensors = {
        name: getattr(table, name).contiguous()
        for name in TENSORS
        if getattr(table, name) is not None
    }
    save_file(tensors, folder / FILE, metadata={"encoder": table.encoder})


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
    """Return the table of a set's captions: ids of words for digits, else that of its folder."""
    if is_coco(data):
        return stored_table(captions_folder())
    if data.name not in grammar.NAMES:
        return read_table(folder_of(data))
    vocabulary = backbones.Vocabulary(grammar.WORDS)
    texts = [caption.text for caption in grammar.captions_of(data.name)]
    ids = vocabulary.encode(texts, grammar.TOKENS)
    return backbones.CaptionTable(ids=ids, encoder=vocabulary.digest())


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
