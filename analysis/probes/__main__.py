"""Probe trained rows, a published checkpoint or a diffusers model.

    python -m analysis.probes locality --table 4 --rows DiCo-S "CM->Self-Attn"
    python -m analysis.probes channels --table 4
    python -m analysis.probes channels --study my_study.py
    python -m analysis.probes tokens --table v2-3 --rows DiCo-CrossAttn --protocol digits_text
    python -m analysis.probes locality --checkpoint DiT-XL-2-512x512.pt --backbone dit_xl_2 \\
        --protocol imagenet512 --images 1 --gradients 0
    python -m analysis.probes locality --diffusers FLUX.1-dev --conditioning prompt.npz \\
        --grid 32 32 --images 1

`locality` measures where a network looks, `channels` which channels of its last mixer are alive,
`features` what its first stage puts out, and `tokens` from which places of the image the tokens of
a caption are read. A row must have been trained on this machine. Records and arrays go to
results/records/<probe>.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.probes.declared import PROBES, DiffusersLocality, Probe, declared
from analysis.probes.targets import (
    Overrides,
    Request,
    Target,
    checkpoint_target,
    diffusers_target,
    row_targets,
)
from analysis.query import TRAINED
from experiments import text_to_image
from experiments.declared.protocols import CAPTIONED, PROTOCOLS
from experiments.engine.choices import Choices, add_study_option, choices_from
from experiments.engine.cli import Parser, add_device_option, add_results_option, run_command
from experiments.engine.records.store import Record, Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import Table, read_table_name, table_of


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 all probed, 1 some not probed, 2 none probed or bad input."""
    return run_command(lambda: probe_targets(arguments))


def probe_targets(arguments: list[str] | None) -> int:
    """Probe what the arguments name and print a line per network."""
    words = sys.argv[1:] if arguments is None else arguments
    own = Choices(TRAINED | text_to_image.TABLES, PROTOCOLS | CAPTIONED)
    choices = choices_from(words, own)
    args = _parser(choices).parse_args(words)
    check_arguments(args)
    store = Store(args.results, REPOSITORY / "results" / "reference")
    targets = choose_targets(args, choices, store)
    store.check_writable()

    failed = [target.label for target in targets if not probe_one(target, args, store)]
    if failed:
        print(f"error: not probed: {', '.join(failed)}", file=sys.stderr)
    if len(failed) == len(targets):
        return 2
    return 1 if failed else 0


def _parser(choices: Choices) -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m analysis.probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("probe", choices=list(PROBES))
    _add_row_options(parser, choices)
    _add_other_network_options(parser)
    _add_measurement_options(parser)
    return parser


def _add_row_options(parser: argparse.ArgumentParser, choices: Choices) -> None:
    add_study_option(parser)
    parser.add_argument(
        "--table",
        type=read_table_name,
        choices=list(choices.tables),
        help="table of the paper that declares the rows (default: the one of the first of --rows)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="labels of the rows to probe (default: every row of --table with a network)",
    )
    parser.add_argument(
        "--protocol",
        choices=list(choices.protocols),
        default=choices.protocol,
        help="protocol of the rows' training, or of a checkpoint's input "
        f"(default: {choices.protocol})",
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")


def _add_other_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="probe a published checkpoint instead of a row; needs --backbone",
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="network of the checkpoint, e.g. dico_xl; the protocol gives its input",
    )
    parser.add_argument(
        "--diffusers",
        type=Path,
        metavar="DIR",
        help="probe the DiT, PixArt or Flux transformer of a local diffusers model or pipeline "
        "(locality only)",
    )
    parser.add_argument(
        "--conditioning",
        type=Path,
        metavar="NPZ",
        help="text embeddings for --diffusers, named as the model's arguments (default: zeros)",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="grid of Flux's packed latent tokens (default: 32 32, for 512 pixels)",
    )


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    # These options change the measurement, and so the record.
    parser.add_argument("--images", type=int, help="images in the batch (default: the probe's own)")
    parser.add_argument(
        "--steps",
        type=int,
        help="sampling steps from noise to images (default: the probe's own)",
    )
    parser.add_argument(
        "--gradients",
        type=int,
        metavar="N",
        help="locality: tokens whose gradients are taken, 0 for none (default: the probe's own)",
    )
    parser.add_argument(
        "--anchors",
        nargs="+",
        metavar="ROW,COLUMN",
        help="locality: tokens whose maps are kept, as fractions of the grid from 0 to 1 "
        "(default: the probe's own)",
    )

    # These options change only where and how it runs.
    add_device_option(parser, default="cpu")
    parser.add_argument(
        "--memory",
        type=int,
        default=512,
        metavar="MIB",
        help="memory for a chunk of weights, in MiB (default: 512)",
    )
    parser.add_argument("--again", action="store_true", help="probe again what has a record")
    add_results_option(parser, use_environment=False)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments that argparse cannot; ValueError for what does not fit together."""
    # Exactly one source of networks.
    from_rows = bool(args.table is not None or args.rows or args.study)
    sources = (from_rows, args.checkpoint is not None, args.diffusers is not None)
    if sum(sources) != 1 or (args.checkpoint is None) != (args.backbone is None):
        raise ValueError(
            "name exactly one of --table, --rows or --study, --checkpoint with --backbone, and "
            "--diffusers; "
            "--help lists the options"
        )

    # Options that belong to locality alone.
    if args.probe != "locality":
        if args.diffusers:
            raise ValueError(
                f"diffusers' transformers are probed for locality alone, not for {args.probe}"
            )
        if args.anchors:
            raise ValueError("--anchors belongs to locality")
        if args.gradients is not None:
            raise ValueError("--gradients belongs to locality")

    # Numbers in their range.
    for name in ("images", "steps", "memory"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} takes a number from 1 on")
    if args.gradients is not None and args.gradients < 0:
        raise ValueError("--gradients takes a number from 0 on")


def parse_anchor(text: str) -> tuple[float, float]:
    """Return the row and the column of an anchor such as 0.5,0.25."""
    try:
        row, column = (float(number) for number in text.split(","))
        if 0 <= row <= 1 and 0 <= column <= 1:
            return row, column
    except ValueError:
        pass
    raise ValueError(
        f"--anchors takes a row and a column, fractions from 0 to 1 such as 0.5,0.25, not {text!r}"
    )


def choose_targets(args: argparse.Namespace, choices: Choices, store: Store) -> list[Target]:
    """Return the networks that the arguments name, with their probes."""
    anchors = tuple(parse_anchor(text) for text in args.anchors) if args.anchors else None
    overrides = Overrides(args.images, args.steps, args.gradients, anchors)
    if args.diffusers:
        grid = (args.grid[0], args.grid[1]) if args.grid else None
        return [diffusers_target(args.diffusers, args.conditioning, grid, overrides)]

    request = Request(args.probe, choices.protocols[args.protocol], overrides)
    if args.checkpoint:
        return [checkpoint_target(request, args.checkpoint, args.backbone)]
    return row_targets(request, _table(args, request, choices), args.rows, args.seed, store)


def _table(args: argparse.Namespace, request: Request, choices: Choices) -> Table:
    """Return the table that is named, or the one that declares the first of the rows."""
    number = choices.table if args.table is None and not args.rows else args.table
    if number is not None:
        return choices.tables[number]
    return table_of(
        args.rows[0],
        choices.tables,
        lambda row: declared(request.probe, row, request.protocol, args.seed),
    )


def probe_one(target: Target, args: argparse.Namespace, store: Store) -> bool:
    """Probe a network unless it has a record. Return False, with a message, if that failed."""
    import torch

    from analysis.probes.execute import Files, Machine, execute
    from experiments.engine.machine.gpu import prepare_torch

    prepare_torch(args.device)
    record = None if args.again else current_record(target.spec, store)
    if record:
        print(f"{target.label}: done before, {record.kind} {record.id}")
        return True

    files = Files(args.checkpoint, args.diffusers, args.conditioning)
    machine = Machine(torch.device(args.device), args.memory)
    try:
        record = execute(target.spec, store, files, machine)
    except ValueError as error:
        print(f"{target.label}: {error}", file=sys.stderr)
        return False
    except (MemoryError, torch.OutOfMemoryError):
        print(
            f"{target.label}: out of memory; "
            "probe fewer images (--images) or a smaller chunk (--memory)",
            file=sys.stderr,
        )
        return False

    seconds = record.provenance["seconds"]
    values = [f"{name} {value}" for name, value in record.values.items() if name != "arrays"]
    print(
        f"{target.label}: {record.kind} {record.id}, {seconds:.0f} s: {'; '.join(values)}",
        flush=True,
    )
    return True


def current_record(spec: Probe | DiffusersLocality, store: Store) -> Record | None:
    """Return the probe's record, unless a later training has replaced the weights that it is of."""
    record = store.here.latest(spec)
    if record is None or spec.weights is not None:
        return record
    assert isinstance(spec, Probe), spec
    trained = store.here.latest(spec.train)
    if trained and record.provenance["weights_sha256"] != trained.values["weights_sha256"]:
        return None
    return record


if __name__ == "__main__":
    raise SystemExit(main())
