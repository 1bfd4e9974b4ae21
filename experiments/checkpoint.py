"""Check that a published checkpoint holds the network that its name says, or export it.

    python experiments/checkpoint.py dico_xl DiCo-XL.pt
    python experiments/checkpoint.py export dico_xl DiCo-XL.pt --out dico_xl.safetensors
    python experiments/checkpoint.py export dit_xl_2 DiT-XL-2-256x256.pt --out FOLDER --diffusers
    python experiments/checkpoint.py export dit_xl_2 FOLDER --out dit_xl_2.safetensors

This reads a .pt file (flat, or with its weights under `ema` or `state_dict`) or a .safetensors file
without running its code, loads it strictly into the registered backbone, and prints what it holds.
A folder is a DiT of the diffusers library. `export` writes the weights under their authors' names,
and a DiT also as a folder that diffusers' DiTPipeline loads beside a VAE.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import TYPE_CHECKING, cast

from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    load_network,
    parse_options,
)
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.specs.spec import Backbone

if TYPE_CHECKING:
    from torch import nn


def main() -> int:
    """Print what the file holds; the exit status is 2 if it is another network."""
    if sys.argv[1:2] == ["export"]:
        return run_command(lambda: _export(sys.argv[2:]))
    return run_command(_check)


def _load(args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the network that the options name, with the weights of a file or a folder, and a key.

    Raises:
        ValueError: if the file holds another network.
    """
    size = {"input_size": args.input_size} if args.input_size else {}
    declared = size | parse_options(args.option)
    file = CheckpointFile(args.backbone, args.file, args.key, declared).with_numerics()
    network = load_network(Backbone(args.backbone, file.options), file, exact=True)

    # A folder says more of its network than the command line.
    for name in file.options.keys() - declared.keys():
        value = file.options[name]
        print(f"{args.file.name}: trained with {name} {value:g}, an option of the network")
    return network


def _check() -> int:
    args = _parse()
    import torch

    # Loading is strict: other names or shapes raise.
    model, key = _load(args)

    # Weights that are not finite load too.
    side = cast(int, model.input_size)
    x = torch.zeros(1, cast(int, model.in_channels), side, side)
    with torch.inference_mode():
        output = model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    if not output.isfinite().all():
        raise ValueError(f"{args.file.name} loads, but its output is not finite")

    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.file.name}: {args.backbone}, {len(model.state_dict())} tensors, "
        f"{num_parameters:,} parameters, loaded strictly (key {key})"
    )
    return 0


def _export(arguments: list[str]) -> int:
    parser = Parser(prog="checkpoint.py export", description="Write a network's weights anew.")
    _add_file_options(parser)
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file, or a folder")
    parser.add_argument(
        "--diffusers", action="store_true", help="write a DiT as a folder of the diffusers library"
    )
    args = parser.parse_args(arguments)
    if args.out.exists():
        raise ValueError(f"{args.out} is there; name another --out")
    if not args.diffusers and args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out}: name a .safetensors file, or add --diffusers for a folder")

    from safetensors.torch import save

    from backbones.diffusers_format import write_pipeline
    from backbones.dit import DiT

    model, _ = _load(args)
    if not args.diffusers:
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        with written_whole(args.out) as file:
            file.write(save(weights))
    elif type(model) is not DiT:
        raise ValueError(f"{args.backbone} has no form in the diffusers library; dit_* has")
    else:
        for warning in write_pipeline(model, args.out):
            print(f"warning: {warning}", file=sys.stderr)
    print(f"{args.out}: {args.backbone}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_file_options(parser)
    return parser.parse_args()


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="registered name, e.g. dico_xl or dit_xl_2")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--input-size",
        type=int,
        help="side of the latent, e.g. 64 for DiT at 512 pixels (default: the network's own)",
    )
    add_network_options(parser)


if __name__ == "__main__":
    raise SystemExit(main())
