"""Probe trained rows or a published checkpoint.

    python -m analysis.probes locality --table 4 --rows DiCo-S "CM->Self-Attn"
    python -m analysis.probes channels --table 4
    python -m analysis.probes locality --checkpoint DiT-XL-2-512x512.pt --backbone dit_xl_2 --protocol imagenet512 --images 1 --gradients 0
    python -m analysis.probes locality --diffusers FLUX.1-dev --conditioning prompt.npz --grid 32 32 --images 1

A row must have been trained here; its record and arrays go to results/records/<probe>.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

from analysis.probes.declared import (
    PROBES,
    DiffusersLocality,
    Locality,
    Probe,
    declared,
    of_training,
)
from analysis.query import TRAINED, train_command, trained_row, trained_rows
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.store import REPOSITORY, Record, Store
from experiments.engine.specs.rows import table_of
from experiments.engine.specs.spec import Backbone, Diffusion, Train, spec_id


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a probe had nothing to probe in some rows, 2 bad input."""
    return run_command(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    args = _parse(arguments)
    store = Store(args.results, REPOSITORY / "results" / "reference")
    asked = (
        _diffusers(args)
        if args.diffusers
        else _published(args)
        if args.checkpoint
        else _rows(args, store)
    )
    store.check_writable()
    return _run(asked, args, store)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("probe", choices=list(PROBES))
    parser.add_argument(
        "--table",
        type=int,
        choices=list(TRAINED),
        help="table of the paper whose rows are probed (default: the one that declares the first of --rows)",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, by label")
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="digits",
        help="under which the rows were trained (default: digits)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a published checkpoint in place of a row"
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="the network in it, e.g. dico_xl; the protocol gives its input",
    )
    parser.add_argument(
        "--diffusers",
        type=Path,
        metavar="DIR",
        help="locality: a local diffusers model or pipeline with a DiT, PixArt or Flux transformer",
    )
    parser.add_argument(
        "--conditioning",
        type=Path,
        metavar="NPZ",
        help="its text embeddings, by the names of the model's arguments (default: zeros)",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="Flux: packed latent tokens, 32 32 for 512 pixels (default)",
    )
    parser.add_argument(
        "--images", type=int, help="in the batch that is probed (default: the probe's own)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of the sampler on the way from noise to images (default: the probe's own)",
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
        help="locality: tokens whose maps are kept, as fractions of a grid from 0 to 1 (default: the probe's own)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--memory",
        type=int,
        default=512,
        metavar="MIB",
        help="for a chunk of weights (default: 512)",
    )
    parser.add_argument("--again", action="store_true", help="probe also what has a record")
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    args = parser.parse_args(arguments)
    if args.rows and (args.table, args.checkpoint, args.diffusers) == (None, None, None):
        args.table = table_of(
            args.rows[0],
            TRAINED,
            lambda row: declared(args.probe, row, PROTOCOLS[args.protocol], args.seed),
        ).number
    sources = (args.table, args.checkpoint, args.diffusers)
    if sum(source is not None for source in sources) != 1 or (args.checkpoint is None) != (
        args.backbone is None
    ):
        raise ValueError(
            "name one of --table or --rows, --checkpoint with --backbone, and --diffusers; --help lists the options"
        )
    if args.diffusers and args.probe != "locality":
        raise ValueError(
            f"diffusers' transformers are probed for locality alone, not for {args.probe}"
        )
    for name in ("images", "steps", "memory"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} takes a number from 1 on")
    if args.gradients is not None and (args.gradients < 0 or args.probe != "locality"):
        raise ValueError("--gradients takes a number from 0 on, and belongs to locality")
    if args.anchors and args.probe != "locality":
        raise ValueError("--anchors belongs to locality")
    args.anchors = args.anchors and tuple(map(_anchor, args.anchors))
    return args


def _anchor(text: str) -> tuple[float, float]:
    try:
        row, column = map(float, text.split(","))
    except ValueError:
        row = column = -1.0
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise ValueError(
            f"--anchors takes a row and a column, fractions from 0 to 1 such as 0.5,0.25, not {text!r}"
        )
    return row, column


def _rows(args: argparse.Namespace, store: Store) -> list[tuple[str, Probe]]:
    """The probes of the rows, each of whose runs must be finished here."""
    table = TRAINED[args.table]
    labels = args.rows or [row.label for row in table.rows if row.backbone]
    asked = [
        (
            label,
            declared(args.probe, trained_row(table, label), PROTOCOLS[args.protocol], args.seed),
        )
        for label in labels
    ]
    untrained = [
        label
        for label, spec in asked
        if not list((store.run_dir(spec.train) / "checkpoints").glob("step-*.pt"))
    ]
    if untrained:
        raise ValueError(
            f"not trained here: {', '.join(untrained)}; train with: {train_command(table, untrained, PROTOCOLS[args.protocol], args.seed)}"
        )
    return [(label, _chosen(spec, args)) for label, spec in asked]


def _published(args: argparse.Namespace) -> list[tuple[str, Probe]]:
    import backbones

    if not args.checkpoint.is_file():
        raise ValueError(
            f"{args.checkpoint}: no such checkpoint; give the path of a .pt or .safetensors file"
        )
    with open(args.checkpoint, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    protocol = PROTOCOLS[args.protocol]
    known = backbones.options_of(args.backbone)  # raises for unknown names
    options = dict(
        input_size=protocol.data.size,
        in_channels=protocol.data.channels,
        num_classes=protocol.data.num_classes,
    )
    methods = [
        row.method
        for table in TRAINED.values()
        for row in trained_rows(table).values()
        if row.backbone.name == args.backbone and row.method
    ]
    diffusion = methods[0].diffusion if methods else Diffusion()
    spec = Train(
        Backbone(args.backbone, {name: value for name, value in options.items() if name in known}),
        protocol.data,
        protocol.recipe,
        diffusion,
    )
    return [(args.checkpoint.name, _chosen(of_training(args.probe, spec, weights), args))]


def _diffusers(args: argparse.Namespace) -> list[tuple[str, DiffusersLocality]]:
    from analysis.probes import diffusers_models

    model = type(diffusers_models.load(args.diffusers)).__name__
    text = diffusers_models.conditioning_from(args.conditioning)[1] if args.conditioning else None
    given = dict(
        steps=args.steps,
        images=args.images,
        gradient_queries=args.gradients,
        anchors=args.anchors,
        grid=args.grid and tuple(args.grid),
    )
    chosen = {name: value for name, value in given.items() if value is not None}
    return [
        (
            args.diffusers.name,
            DiffusersLocality(model, diffusers_models.digest(args.diffusers), text, **chosen),
        )
    ]


def _chosen(spec: Probe, args: argparse.Namespace) -> Probe:
    if args.steps is not None:
        spec = replace(spec, sampler=replace(spec.sampler, num_steps=args.steps))
    if args.images is not None:
        spec = replace(spec, images=args.images)
    if args.gradients is not None and isinstance(spec, Locality):
        spec = replace(spec, gradient_queries=args.gradients)
    if args.anchors and isinstance(spec, Locality):
        spec = replace(spec, anchors=args.anchors)
    return spec


def _run(
    asked: list[tuple[str, Probe]] | list[tuple[str, DiffusersLocality]],
    args: argparse.Namespace,
    store: Store,
) -> int:
    import torch

    from analysis.probes.execute import Files, execute
    from experiments.engine.jobs.execute import require_device

    require_device(args.device)
    failed = []
    for label, spec in asked:
        if not args.again and (record := _done(spec, store)):
            print(f"{label}: done before, {record.kind} {record.id}")
            continue
        try:
            record = execute(
                spec,
                store,
                Files(args.checkpoint, args.diffusers, args.conditioning),
                torch.device(args.device),
                args.memory,
            )
        except ValueError as error:
            failed.append(label)
            print(f"{label}: {error}", file=sys.stderr)
            continue
        except (MemoryError, torch.OutOfMemoryError):
            failed.append(label)
            print(
                f"{label}: out of memory; probe fewer images (--images) or a smaller chunk (--memory)",
                file=sys.stderr,
            )
            continue
        print(
            f"{label}: {record.kind} {spec_id(spec)}, {record.provenance['seconds']:.0f} s: {_shown(record.values)}",
            flush=True,
        )
    if failed:
        print(f"error: not probed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed and len(failed) < len(asked) else 2 if failed else 0


def _done(spec: Probe | DiffusersLocality, store: Store) -> Record | None:
    """The probe's record, unless it is of weights that a later training has replaced."""
    record = store.here.latest(spec)
    if record and spec.weights is None and (trained := store.here.latest(spec.train)):
        return (
            record
            if record.provenance["weights_sha256"] == trained.values["weights_sha256"]
            else None
        )
    return record


def _shown(values: dict[str, object]) -> str:
    return "; ".join(f"{name} {value}" for name, value in values.items() if name != "arrays")


if __name__ == "__main__":
    raise SystemExit(main())
