"""Weights of a file in a network of another image size or number of classes.

Positions that a formula gives are computed anew, and learned ones are interpolated. The label table
changes only as it is asked to. Everything else must be the network's own, name by name and shape by
shape.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backbones.adm import ADM
from backbones.captions import TextNetwork
from backbones.checkpoint import FLAT, UNREAD, load_judged, print_warning, read_weights
from backbones.diffusers_format import CLASSES, class_in, from_diffusers, read_numerics
from backbones.diffusers_unets import read_unet
from backbones.dit import DiT
from backbones.judgement import Warn, Weights
from backbones.ldm import LDM
from backbones.registry import NoLabels
from backbones.text_unet import TextUNet

MASKED = "UVit2DModel"  # of the diffusers library, and no diffusion network


class Labels(Enum):
    """What becomes of the label table of a file."""

    SAME = "same"
    """It is that of the network, which has as many classes."""

    KEEP = "keep"
    """The classes that both have and the null label keep their rows; further rows are drawn."""

    REDRAW = "redraw"
    """The whole table is drawn, or left out if the network has no classes."""


@dataclass
class Fit:
    """What a network took from a file, by the names of its tensors."""

    # The key under which the weights lay.
    key: str = FLAT
    # Tensors of which every number came from the file.
    kept: list[str] = field(default_factory=list)
    # Label tables of which these rows came from the file.
    kept_rows: dict[str, int] = field(default_factory=dict)
    # Tensors of which every number was drawn, or left out.
    redrawn: list[str] = field(default_factory=list)
    # Positions that were computed for this size.
    recomputed: list[str] = field(default_factory=list)
    # Learned positions that were interpolated to this size.
    interpolated: list[str] = field(default_factory=list)
    # Numbers among the network's parameters that came from the file as they were, and all of them.
    num_from_file: int = 0
    num_parameters: int = 0

    def describe(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return {
            "key": self.key,
            "parameters": self.num_parameters,
            "parameters_from_file": self.num_from_file,
            "tensors_kept": len(self.kept),
            "label_rows_kept": self.kept_rows,
            "redrawn": self.redrawn,
            "recomputed": self.recomputed,
            "interpolated": self.interpolated,
        }

    def changes(self) -> str:
        """Return in words which tensors are not as in the file; '' if all are."""
        parts = {
            "redrawn": self.redrawn,
            "partly redrawn": list(self.kept_rows),
            "recomputed for this size": self.recomputed,
            "interpolated to this size": self.interpolated,
        }
        return "; ".join(f"{', '.join(names)} {how}" for how, names in parts.items() if names)


def load_fitted(
    model: nn.Module,
    path: Path,
    key: str | None = None,
    labels: Labels = Labels.SAME,
    *,
    warn: Warn = print_warning,
) -> Fit:
    """Judge weights and load them, fitted to the model, or leave the model untouched.

    Args:
        model: The network, whose own numbers stay where the file has none that fit.
        path: A `.safetensors` or `.pt` file, or a folder of diffusers' DiT or U-Nets.
        key: The key that holds the weights, as in `read_weights`.
        labels: What becomes of the label table.
        warn: Hears, in one line each, what the weights lost or what wrapped their names.

    Returns:
        What the model took from the file.

    Raises:
        ValueError: As in `load_published`, for a folder that was trained with other numerics, and
            for another number of classes without a word on the label table.
    """
    result = Fit()
    if path.is_dir():
        stored, rename = read_folder(path, model), None
    else:
        stored, result.key = read_weights(path, key)
        rename = getattr(model, "from_checkpoint", None)

    def adapt(weights: Weights) -> Weights:
        own_names = rename(weights) if rename else weights
        return fit(model, own_names, labels, path.name, result)

    load_judged(model, stored, path.name, adapt, warn=warn)
    return result


def read_folder(path: Path, model: nn.Module) -> Weights:
    """Read a folder of diffusers' DiT or U-Nets for a network, under the authors' names.

    Raises:
        ValueError: If the folder holds another network, or it computes otherwise.
    """
    found = class_in(path)
    if found == MASKED:
        raise ValueError(
            f"{path.name} holds a {MASKED}, which fills in masked codes of an image and knows no "
            "noise; no network here has that form, and U-ViT's least of all"
        )
    if isinstance(model, ADM | LDM | TextUNet):
        return read_unet(path, model)
    if type(model) is not DiT or found not in CLASSES:
        raise ValueError(
            f"{path.name} holds a {found}, which is not read into {type(model).__name__}; folders "
            "of the diffusers library hold a DiT, a UNet2DConditionModel of LDM or a text U-Net, "
            "or a UNet2DModel of ADM"
        )
    there, weights = from_diffusers(path)

    # No tensor tells these from others.
    trained = {name: getattr(there, name) for name in ("heads", *read_numerics(path))}
    differing = [name for name, value in trained.items() if getattr(model, name) != value]
    if differing:
        other = [f"{name}={trained[name]:g}" for name in differing]
        raise ValueError(
            f"{path.name} was trained with {', '.join(other)}; declare this of the network"
        )
    return weights


def fit(
    model: nn.Module, weights: Weights, labels: Labels, file: str, result: Fit | None = None
) -> Weights:
    """Return weights for a model, with the model's own numbers where these have none that fit.

    Args:
        model: The network.
        weights: Tensors by the network's own names.
        labels: What becomes of the label table.
        file: Name of the file, for messages.
        result: Is told what was done.

    Raises:
        ValueError: For another number of classes without a word on the label table.
    """
    result = Fit() if result is None else result
    own = model.state_dict()

    # Weights of another family are left as they are, for strict loading to name the differences.
    if _have_names_of(model, own, weights):
        weights = _fit_labels(model, own, weights, labels, file, result)
        weights = _fit_positions(model, own, weights, result)

    # What nothing was done to is as the file has it.
    changed = {*result.redrawn, *result.kept_rows, *result.recomputed, *result.interpolated}
    result.kept = [name for name in own if name not in changed]
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        result.num_parameters += number
        if name in result.kept_rows:
            number = number // len(parameter) * result.kept_rows[name]
        elif name in changed:
            number = 0
        result.num_from_file += number
    return weights


def _have_names_of(model: nn.Module, own: Weights, weights: Weights) -> bool:
    """Tell whether names differ by no more than label tables and what old files lack."""
    tables = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, NoLabels) or _is_label_table(model, module)
    }
    differing = (own.keys() ^ weights.keys()) - tables
    return all(name.endswith(UNREAD) for name in differing)


def _fit_labels(
    model: nn.Module, own: Weights, weights: Weights, labels: Labels, file: str, result: Fit
) -> Weights:
    """Return weights whose label tables have the rows of the network's."""
    fitted = dict(weights)
    num_classes = getattr(model, "num_classes", 0)
    for name, module in model.named_modules():
        table = f"{name}.weight"
        if isinstance(module, NoLabels) and table in weights:
            _require_word(labels, {Labels.REDRAW}, f"{file} has a label table and this network", 0)
            del fitted[table]
            result.redrawn.append(table)
        if not _is_label_table(model, module):
            continue

        # The word is needed only where the tables differ, and is followed wherever it stands.
        stored = weights.get(table)
        if stored is None:
            text = f"{file} has no label table {table} and this network"
            _require_word(labels, {Labels.REDRAW}, text, num_classes)
        elif len(stored) != len(own[table]):
            theirs = num_classes + len(stored) - len(own[table])
            text = f"{file} has {theirs} classes and this network"
            _require_word(labels, {Labels.KEEP, Labels.REDRAW}, text, num_classes)
            if labels is Labels.KEEP and stored.shape[1:] == own[table].shape[1:]:
                fitted[table], kept = _join_rows(own[table], stored, num_classes)
                result.kept_rows[table] = kept
        if labels is Labels.REDRAW:
            fitted[table] = own[table].clone()
            result.redrawn.append(table)
    return fitted


def _is_label_table(model: nn.Module, module: nn.Module) -> bool:
    """Tell whether a module holds a row per class, with or without one for the null label."""
    if isinstance(model, TextNetwork) or not isinstance(module, nn.Embedding):
        return False
    num_classes = getattr(model, "num_classes", 0)
    return num_classes > 0 and module.num_embeddings in (num_classes, num_classes + 1)


def _require_word(labels: Labels, fitting: Collection[Labels], what: str, number: int) -> None:
    """Raise ValueError unless a fitting word says what becomes of the label table."""
    if labels not in fitting:
        words = " or ".join(repr(word.value) for word in Labels if word in fitting)
        raise ValueError(
            f"{what} has {number or 'none'}; a training that starts from it declares labels={words}"
        )


def _join_rows(own: Tensor, stored: Tensor, num_classes: int) -> tuple[Tensor, int]:
    """Return the network's table with the file's rows in it, and how many these are."""
    has_null = len(own) > num_classes
    table = own.clone()
    shared = min(len(own), len(stored)) - has_null
    table[:shared] = stored[:shared]
    if has_null:
        table[-1] = stored[-1]
    return table, shared + has_null


def _fit_positions(model: nn.Module, own: Weights, weights: Weights, result: Fit) -> Weights:
    """Return weights whose positions are those of the network's size."""
    fitted = dict(weights)
    parameters = dict(model.named_parameters())
    for name, value in own.items():
        stored = weights.get(name)
        frozen = name not in parameters or not parameters[name].requires_grad
        if stored is None or not frozen or stored.dim() != value.dim():
            continue
        if stored.shape != value.shape:
            fitted[name] = value.clone()
            result.recomputed.append(name)

    # The family knows which of its learned tensors are positions.
    resize: Any = getattr(model, "resized", None)
    if resize is None:
        return fitted
    resized: Weights = resize(fitted)
    result.interpolated += [name for name in own if resized[name].shape != fitted[name].shape]
    return resized
