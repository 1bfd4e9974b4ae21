"""What a captioned set of pictures needs on this machine. Standard library only.

Both protocols on MS-COCO read the same captions, and latents of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.engine.data.captioned.grammar import VOCABULARY
from experiments.engine.specs.spec import Data

CAPTIONS = "coco2014_captions"
MANIFEST = "manifest.json"
STATES = "captions.safetensors"
PREFIX = "coco256_"
PREPARE = "python experiments/prepare.py"
CAPTIONS_COMMAND = (
    f"{PREPARE} captions --train captions_train2014.json --validation captions_val2014.json "
    "--encoder FOLDER"
)


def is_coco(data: Data) -> bool:
    """Return whether a set's pictures are described by the captions of MS-COCO."""
    return data.name.startswith(PREFIX)


def read_captions_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of captions.

    Raises:
        ValueError: It is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished captions; {CAPTIONS_COMMAND} makes them")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        for name in ("num_captions", "num_images", "trained", "index_sha256", "shape", "shards"):
            manifest[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); prepare the captions again"
        ) from None
    return manifest


def require_coco(root: Path, folder: Path, data: Data) -> None:
    """Raise ValueError with the commands that make what a set lacks.

    Args:
        root: Where all data lie.
        folder: Of the set's latents.
        data: The set.
    """
    missing = []
    if not (root / CAPTIONS / MANIFEST).is_file():
        missing.append(
            f"captions and their states in data/{CAPTIONS} (or $DICO_DATA/{CAPTIONS}): "
            f"{CAPTIONS_COMMAND}"
        )
    if not (folder / MANIFEST).is_file():
        missing.append(
            f"latents in data/{folder.name} (or $DICO_DATA/{folder.name}): {PREPARE} latents "
            f"--protocol {data.name} --images train2014"
        )
    if missing:
        raise ValueError(f"protocol {data.name} lacks {'; and '.join(missing)}")

    # The network is built for the number of captions, and the null caption is that number.
    number = read_captions_manifest(root / CAPTIONS)["num_captions"]
    if number != data.num_classes:
        raise ValueError(
            f"{root / CAPTIONS} holds {number} captions, and protocol {data.name} is declared for "
            f"{data.num_classes}; prepare those of all training and validation images"
        )


def require_states(folder: Path, data: Data) -> None:
    """Raise ValueError with the command that makes the states of captions of digits.

    Args:
        folder: Of the set.
        data: The set.
    """
    if data.captions in ("", VOCABULARY) or (folder / STATES).is_file():
        return
    raise ValueError(
        f"set {data.name} lacks the states of its captions by {data.captions}, {STATES} in "
        f"data/{folder.name} (or $DICO_DATA/{folder.name}): {PREPARE} captions --protocol "
        "digits_text_minilm --encoder FOLDER makes them; its --help says from what"
    )


def missing_reference(data: Data) -> str:
    """Say what reference a set is scored against, and how it is made."""
    return (
        f"the reference of the validation images in data/{data.name} (or $DICO_DATA/{data.name}): "
        "python experiments/evaluate.py reference val2014 --size 256 --crop square --lossy "
        f"--out data/{data.name}/reference.npz makes it"
    )
