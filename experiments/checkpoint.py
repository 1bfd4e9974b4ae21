"""Check that a published checkpoint holds the network that its name says.

    python experiments/checkpoint.py dico_xl DiCo-XL.pt

This reads a .pt file (flat, or with its weights under `ema` or `state_dict`) or a .safetensors file
without running its code, loads it strictly into the registered backbone, and prints what it holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import cast

from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    load_network,
    parse_options,
)
from experiments.engine.cli import Parser, run_command
from experiments.engine.specs.spec import Backbone


def main() -> int:
    """Print what the file holds; the exit status is 2 if it is another network."""
    return run_command(_check)


def _check() -> int:
    args = _parse()
    import torch

    # Loading is strict: other names or shapes raise.
    size = {"input_size": args.input_size} if args.input_size else {}
    backbone = Backbone(args.backbone, size | parse_options(args.option))
    file = CheckpointFile(args.backbone, args.file, args.key)
    model, key = load_network(backbone, file)

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


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="registered name, e.g. dico_xl or dit_xl_2")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--input-size",
        type=int,
        help="side of the latent, e.g. 64 for DiT at 512 pixels (default: the network's own)",
    )
    add_network_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
