"""Published checkpoints: read without running their code, and loaded strictly."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

USUAL = ("ema", "state_dict")  # where published files keep their weights, unless they lie flat
FLAT = "none: flat"
NAMED = 6  # differing keys of a kind that an error names


class Unread:
    """Stands for a class that a file names and nothing here needs."""


# The authors' trainers save their arguments; LDM's the class of a callback beside the weights.
ADMITTED = [
    argparse.Namespace,
    (Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def read_weights(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights of a `.safetensors` or `.pt` file and the key under which they lay: `key`, or if None the first of USUAL that is there, else FLAT.

    Raises ValueError in one line for a missing, truncated, pickled-code or non-tensor file, and for one without `key`. Never runs its code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; give the path of a .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            with torch.serialization.safe_globals(ADMITTED):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "it is damaged, cut short or no torch archive: a download page, a git-lfs pointer?"
        if "GLOBAL" in str(error):
            reason = (
                "it holds pickled code or objects, which are not run here; export plain tensors"
            )
        raise ValueError(f"{path.name}: not a readable checkpoint ({reason})") from None
    held = (
        {name: value for name, value in weights.items() if isinstance(value, dict)}
        if isinstance(weights, dict)
        else {}
    )
    if key is not None and key not in held:
        raise ValueError(
            f"{path.name}: holds no weights under {key!r}; its keys: {_listed(weights)}"
        )
    found = key if key is not None else next((name for name in USUAL if name in held), FLAT)
    weights = held.get(found, weights)
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"{path.name}: expected tensors by name, flat or under {' or '.join(map(repr, (key,) if key else USUAL))}; found {_listed(weights)}"
        )
    return weights, found


def _listed(weights: object) -> str:
    return (
        ", ".join(map(str, list(weights)[:8])).replace("\n", " ") or "nothing"
        if isinstance(weights, dict)
        else type(weights).__name__
    )


def load_published(model: nn.Module, path: str | Path, key: str | None = None) -> str:
    """Load a published checkpoint strictly, or leave the model untouched; the key under which its weights lay, as of `read_weights`.

    A network whose authors name its weights otherwise has a `from_checkpoint` that maps their names to its own.
    Raises ValueError in one line with the first missing, unexpected and mis-shaped keys and the number of all.
    """
    weights, found = read_weights(path, key)
    if hasattr(model, "from_checkpoint"):
        weights = model.from_checkpoint(weights)
    expected = model.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, needs {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = [
        [f"missing {name}" for name in expected if name not in weights],
        [f"unexpected {name}" for name in weights if name not in expected],
        shapes,
    ]
    if number := sum(map(len, problems)):
        named = [text for kind in problems for text in kind[:NAMED]]
        more = f"; and {number - len(named)} more" if number > len(named) else ""
        raise ValueError(
            f"{Path(path).name} is a checkpoint of another model ({number} keys differ): "
            + "; ".join(named).replace("\n", " ")
            + more
        )
    model.load_state_dict(weights, strict=True)
    return found
