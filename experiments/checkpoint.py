"""Check that a published checkpoint is the network its name says: `python experiments/checkpoint.py dico_xl DiCo-XL.pt`.

Reads a .pt (flat, or with its weights under `ema` or `state_dict`) or .safetensors file without running its code, loads it strictly
into the registered backbone and prints what it holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.engine.cli import Parser, run_command


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a network from NAME=VALUE with JSON values; ValueError for anything else."""
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


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="registered name, e.g. dico_xl or dit_xl_2")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--input-size",
        type=int,
        help="side of the latent, e.g. 64 for DiT at 512 pixels (default: the network's own)",
    )
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
    args = parser.parse_args()
    import torch

    import backbones

    with torch.random.fork_rng(devices=[]):
        size = {"input_size": args.input_size} if args.input_size else {}
        model = backbones.build(args.backbone, **size, **options_of(args.option))
    key = backbones.load_published(model, args.file, args.key)
    with torch.inference_mode():
        x = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
        finite = model.eval()(x, torch.zeros(1), torch.zeros(1, dtype=torch.long)).isfinite().all()
    if not finite:
        raise ValueError(f"{args.file.name} loads, but its output is not finite")
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{args.file.name}: {args.backbone}, {len(model.state_dict())} tensors, {total:,} parameters, loaded strictly (key {key})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
