"""Published checkpoints: read without running their code, judged, and loaded strictly."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.judgement import (
    Warn,
    Weights,
    check_average,
    check_values,
    convert_stored,
    unwrap_names,
)

USUAL = ("ema", "state_dict")  # keys under which published files keep their weights
FLAT = "none: flat"  # in place of a key: the file holds nothing but weights
UNREAD = "num_batches_tracked"  # end of the name of BatchNorm's counter
NAMED = 6  # how many missing, unexpected and mis-shaped keys an error names


class Unread:
    """Stands for a class that a file names and nothing here needs."""


# The authors' trainers save their arguments; LDM's saves the class of a callback with the weights.
ADMITTED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def read_weights(path: str | Path, key: str | None = None) -> tuple[Weights, str]:
    """Read the weights of a `.safetensors` or `.pt` file without running its code.

    Args:
        path: The file.
        key: The key that holds the weights; by default the first of USUAL, else the whole file.

    Returns:
        The weights and the key under which they lay, or FLAT.

    Raises:
        ValueError: In one line, for a file that is missing, cut short or not of tensors, that holds
            pickled code, that has no such key, or whose average was never updated.
    """
    path = Path(path)
    _require_openable(path)
    content = _read(path)

    # Weights lie flat or in a dictionary under a key.
    nested: dict[str, Any] = {}
    if isinstance(content, dict):
        nested = {name: value for name, value in content.items() if isinstance(value, dict)}
    if key is not None and key not in nested:
        raise ValueError(
            f"{path.name}: holds no weights under {key!r}; its keys: {_list_keys(content)}"
        )
    if key is None:
        key = next((name for name in USUAL if name in nested), FLAT)
    weights = nested.get(key, content)

    if not _are_weights(weights):
        keys = " or ".join(map(repr, USUAL if key == FLAT else (key,)))
        raise ValueError(
            f"{path.name}: expected tensors by name, flat or under {keys}; "
            f"found {_list_keys(weights)}"
        )

    # The weights that were averaged often lie beside their average.
    if key == "ema" and _are_weights(nested.get("model")):
        check_average(weights, nested["model"], path.name)
    return weights, key


def _require_openable(path: Path) -> None:
    """Raise ValueError, with the path and the reason, unless a file can be opened."""
    advice = "give the path of a .pt or .safetensors file"
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        link = f"; its link leads to {path.readlink()}" if path.is_symlink() else ""
        raise ValueError(f"{path}: no such checkpoint{link}; {advice}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, and no checkpoint; {advice}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None


def _read(path: Path) -> Any:
    """Load a file's content; raise ValueError with the likely reason if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(ADMITTED), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # sparse tensors are refused later
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        # The system refused it, whatever it holds.
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        if "allocate memory" in str(error):
            raise MemoryError(f"{path} does not fit into memory") from None
        reason = _explain_refusal(str(error))
        raise ValueError(f"{path.name}: not a readable checkpoint ({reason})") from None


def _explain_refusal(error: str) -> str:
    """Return why a file cannot be read, and the name of the object that torch will not unpickle."""
    refused = re.search(r"(?:GLOBAL|[Cc]lass|but got) (?:<class )?[`']?([A-Za-z_][\w.]*)", error)
    if refused:
        return (
            f"it holds pickled code or objects, here {refused[1]}, which are not run here; "
            "export plain tensors"
        )
    operand = re.search(r"Unsupported operand (\d+)", error)
    if operand:
        return (
            f"its pickle has the instruction {operand[1]}, which is not read here: "
            "it is damaged, or plain pickle wrote it; save plain tensors with torch.save"
        )
    return "it is damaged, cut short or no torch archive: a download page, a git-lfs pointer?"


def _are_weights(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _list_keys(content: Any) -> str:
    """Name the first keys of a dictionary, or the type of anything else, in one line."""
    if not isinstance(content, dict):
        return type(content).__name__
    keys = [str(key) for key in content][:8]
    return ", ".join(keys).replace("\n", " ") or "nothing"


def print_warning(text: str) -> None:
    """Print a warning on the error stream."""
    print(f"warning: {text}", file=sys.stderr)


def load_published(
    model: nn.Module, path: str | Path, key: str | None = None, *, warn: Warn = print_warning
) -> str:
    """Judge a published checkpoint and load it strictly, or leave the model untouched.

    A network whose authors name its weights otherwise has a `from_checkpoint`, which maps their
    names to its own.

    Args:
        model: The network.
        path: A `.safetensors` or `.pt` file.
        key: The key that holds the weights, as in `read_weights`.
        warn: Hears, in one line each, what the weights lost or what wrapped their names.

    Returns:
        The key under which the weights lay, as in `read_weights`.

    Raises:
        ValueError: In one line, for an unreadable file, for weights of another model with the
            first keys that differ, and for weights that no trained network has.
    """
    stored, key = read_weights(path, key)
    rename = getattr(model, "from_checkpoint", None)
    load_judged(model, stored, Path(path).name, rename, warn=warn)
    return key


def load_judged(
    model: nn.Module,
    stored: Weights,
    file: str,
    rename: Callable[[Weights], Weights] | None = None,
    *,
    warn: Warn = print_warning,
) -> None:
    """Judge weights and load them strictly, or leave the model untouched.

    Args:
        model: The network.
        stored: Tensors by name, as a file holds them.
        file: Name of the file, for messages.
        rename: Maps the authors' names of weights to the network's own.
        warn: Hears, in one line each, what the weights lost or what wrapped their names.

    Raises:
        ValueError: As in `load_published`.
    """
    notes: list[str] = []

    # The names come first, then the types, for `rename` may compute with the tensors.
    weights = unwrap_names(stored, model.state_dict(), file, notes.append)
    weights = convert_stored(weights, file, notes.append)
    if rename is not None:
        weights = rename(weights)

    # Files of torch before 0.4.1 lack BatchNorm's counter, which no trained network reads.
    counters = {name: value for name, value in model.state_dict().items() if name.endswith(UNREAD)}
    weights = counters | weights

    # Nothing is loaded, and nothing is said, before all is judged.
    _check_keys(model.state_dict(), weights, file)
    check_values(model, weights, file)
    model.load_state_dict(weights, strict=True)
    for text in notes:
        warn(text)


def _check_keys(expected: Weights, weights: Weights, file: str) -> None:
    """Raise ValueError, with the first differences, unless names and shapes agree."""
    missing = [f"missing {name}" for name in expected if name not in weights]
    unexpected = [f"unexpected {name}" for name in weights if name not in expected]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, needs {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    number = len(missing) + len(unexpected) + len(shapes)
    if number == 0:
        return

    named = [*missing[:NAMED], *unexpected[:NAMED], *shapes[:NAMED]]
    listed = "; ".join(named).replace("\n", " ")
    if number > len(named):
        listed += f"; and {number - len(named)} more"
    raise ValueError(f"{file} is a checkpoint of another model ({number} keys differ): {listed}")
