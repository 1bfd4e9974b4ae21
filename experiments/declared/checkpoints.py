"""Published checkpoints: the network in a file, and the evaluation that scores it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.declared.families import family_of
from experiments.engine.records.weight_files import weights_sha256
from experiments.engine.specs.rows import Row, Table, TableName
from experiments.engine.specs.spec import Backbone, Checkpoint, Diffusion, Evaluate
from experiments.engine.specs.stages import Protocol, cost_stages, sampler_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class CheckpointFile:
    """A file of published weights, and the network that it should hold."""

    # Registered name, e.g. dico_xl.
    backbone: str
    # A .pt or .safetensors file, or a folder of diffusers' DiT or U-Nets.
    path: Path
    # Where a .pt file keeps its weights; None: ema, else state_dict, else flat.
    key: str | None = None
    # Options of the network that differ from its registered ones.
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> CheckpointFile:
        """Return the file that --backbone, --checkpoint, --key and --option name."""
        file = cls(args.backbone, args.checkpoint, args.key, parse_options(args.option))
        return file.with_numerics()

    def with_numerics(self) -> CheckpointFile:
        """Return the file with the options of its network that a folder says by itself."""
        if not self.path.is_dir():
            return self
        from backbones.diffusers_format import CLASSES, class_in, read_numerics

        # A U-Net's folder must say the network by its config, and has no such options.
        if class_in(self.path) not in CLASSES:
            return self
        return replace(self, options=read_numerics(self.path) | self.options)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add --key and --option, which a checkpoint takes beside its file and backbone."""
    parser.add_argument(
        "--key",
        help="where a .pt file keeps its weights (default: ema, else state_dict, else flat)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the network: learn_sigma=false for SiT's 512 model, raster_padding=true for DiM's",
    )


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Return options of a network from NAME=VALUE with JSON values.

    Raises:
        ValueError: for anything else.
    """
    options = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            raise ValueError(
                f"--option takes NAME=VALUE with a JSON value, e.g. learn_sigma=false, got {text!r}"
            ) from None
    return options


def load_network(
    backbone: Backbone, file: CheckpointFile, exact: bool = False
) -> tuple[nn.Module, str]:
    """Return the network, and the key under which the file keeps its weights.

    Args:
        backbone: the network.
        file: its weights, which may be of another size unless `exact`.
        exact: whether every tensor must be as the file has it.

    Raises:
        ValueError: if the file holds another network.
    """
    import torch

    import backbones

    with torch.random.fork_rng(devices=[]):
        model = backbones.build(backbone.name, **backbone.options)
    taken = backbones.load_fitted(model, file.path, file.key)
    if exact and taken.changes():
        raise ValueError(
            f"{file.path.name} holds this network for another input size ({taken.changes()}); name "
            "the size of its weights"
        )
    return model.eval(), taken.key


def published_network(
    file: CheckpointFile, protocol: Protocol, tables: Mapping[TableName, Table]
) -> Backbone:
    """Return the network of a file at a protocol's data.

    A row that declares this very network says which options differ from the registered ones.
    """
    data = protocol.data
    row = nearest_row(file.backbone, protocol, tables)
    declared: dict[str, Any] = {}
    if row and row.backbone and _is_declared_at(row, file.backbone, data.size):
        declared = row.backbone.options
    shape = dict(input_size=data.size, in_channels=data.channels, num_classes=data.num_classes)
    return Backbone(file.backbone, declared | shape | file.options)


def _is_declared_at(row: Row, name: str, size: int) -> bool:
    if row.backbone is None:
        return False
    return row.backbone.name == name and cost_stages(row)[0].size == size


def published_evaluation(
    file: CheckpointFile, protocol: Protocol, tables: Mapping[TableName, Table]
) -> Evaluate:
    """Return the evaluation that scores a file of weights under a protocol."""
    # Objective and sampler are those of a declared row of the same network or family.
    row = nearest_row(file.backbone, protocol, tables)
    diffusion = row.method.diffusion if row and row.method else Diffusion()
    sampler = sampler_of(row, protocol) if row else protocol.sampler
    weights = Checkpoint(
        published_network(file, protocol, tables),
        protocol.data,
        weights_sha256(file.path),
        file.key or Checkpoint.key,
        diffusion,
    )
    return Evaluate(weights, sampler, protocol.num, protocol.features, protocol.labels)


def all_tables(
    own: Mapping[TableName, Table], chosen: Mapping[TableName, Table]
) -> dict[TableName, Table]:
    """Return this tree's tables and those among which a command chooses, such as a study's."""
    return {**{f"chosen {number}": table for number, table in chosen.items()}, **own}


def nearest_row(name: str, protocol: Protocol, tables: Mapping[TableName, Table]) -> Row | None:
    """Return the declared row whose objective and sampler a network shares, if there is one.

    Rows of the network itself come first, then those at the protocol's size, then guided ones. Any
    other row of the network's family is the last choice.
    """
    family = family_of(name)
    rows = [
        row
        for table in tables.values()
        for row in table.rows
        if row.method and row.backbone and family_of(row.backbone.name) == family
    ]

    def distance(row: Row) -> tuple[bool, bool, bool]:
        assert row.backbone
        return (
            row.backbone.name != name,
            cost_stages(row)[0].size != protocol.data.size,
            sampler_of(row, protocol).scale == 1,
        )

    return min(rows, key=distance, default=None)
