"""Uncurated samples of a trained run as one image: `python -m analysis.grid --table 4 --row DiCo-S`.

Or of a published checkpoint: `python -m analysis.grid --backbone dico_xl --checkpoint DiCo-XL.pt --protocol imagenet256_guided`.

One column a class, one row a sample. The r-th sample of class c has the seed of image c + K r of the run's evaluation, K
classes, so nothing is chosen. Latents are decoded by the VAE that $DICO_VAE names. Loads torch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.figures.style import figure, save
from analysis.query import TRAINED, train_command, trained_row
from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    load_network,
    published_evaluation,
    published_network,
)
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, run_command
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.specs.rows import table_of
from experiments.engine.specs.spec import Evaluate
from experiments.engine.specs.stages import Protocol, evaluate_stage
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from torch import Tensor

CAPTION, RECORDS = (
    "Description",
    "Records",
)  # of a PNG's text: what it shows, and the names of its trainings' records


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table",
        type=int,
        choices=list(TRAINED),
        help="that declares the row (default: the one that does)",
    )
    parser.add_argument("--row", help="by label")
    parser.add_argument(
        "--backbone", help="of a published checkpoint: registered name, e.g. dico_xl"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=".pt or .safetensors")
    add_network_options(parser)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="digits")
    parser.add_argument("--seed", type=int, help="training seed of --row (default: 0)")
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        metavar="C",
        help="shown, in this order (default: the first ten)",
    )
    parser.add_argument("--rows", type=int, default=8, help="samples a class (default: 8)")
    parser.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="of classifier-free guidance (default: the protocol's)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    print(f"wrote {_run(parser.parse_args())}")
    return 0


def _run(args: argparse.Namespace) -> Path:
    protocol, store = (
        PROTOCOLS[args.protocol],
        Store(args.results, REPOSITORY / "results" / "reference"),
    )
    chosen, name, what, train = (
        _published(args, protocol) if args.checkpoint or args.backbone else _trained(args, protocol)
    )
    spec = (
        chosen
        if args.scale is None
        else replace(chosen, sampler=replace(chosen.sampler, scale=args.scale))
    )
    classes = args.classes or list(range(min(10, spec.data.num_classes)))
    if args.rows < 1 or not all(0 <= label < spec.data.num_classes for label in classes):
        raise ValueError(
            f"--rows takes a number from 1 on and --classes labels from 0 to {spec.data.num_classes - 1}"
        )
    if not all(store.here.latest(training) for training in spec.trainings):
        raise ValueError(f"no finished run of {args.row!r} here; train it with: {train}")
    scale = "" if args.scale is None else f"_scale{args.scale:g}"
    return draw(
        spec,
        store,
        classes,
        args.rows,
        f"{name}{scale}".replace("/", "").replace(" ", "_"),
        what,
        args.device,
        args.checkpoint,
    )


def _trained(args: argparse.Namespace, protocol: Protocol) -> tuple[Evaluate, str, str, str]:
    """Of a declared row: the evaluation whose images are shown, the grid's name, what it shows, and the command that trains it."""
    if args.row is None or args.key or args.option:
        raise ValueError(
            "say --row, or --backbone and --checkpoint, which alone take --key and --option"
        )
    seed = args.seed or 0
    table = (
        TRAINED[args.table]
        if args.table
        else table_of(args.row, TRAINED, lambda row: evaluate_stage(row, protocol, seed))
    )
    spec = evaluate_stage(trained_row(table, args.row), protocol, seed)
    what = f"{args.row} of Table {table.number} on {protocol.name}, training seed {seed}"
    return (
        spec,
        f"{protocol.name}_table{table.number}_{args.row}_seed{seed}",
        what,
        train_command(table, [args.row], protocol, seed),
    )


def _published(args: argparse.Namespace, protocol: Protocol) -> tuple[Evaluate, str, str, str]:
    """Of a published checkpoint, as evaluate_checkpoint.py scores it; nothing trains it."""
    if (
        not (args.checkpoint and args.backbone)
        or args.row is not None
        or args.table is not None
        or args.seed is not None
    ):
        raise ValueError(
            "--backbone and --checkpoint go together, and without --table, --row and --seed"
        )
    file = CheckpointFile.from_arguments(args)
    load_network(published_network(file, protocol, TABLES), file)  # refuses another network
    spec = published_evaluation(file, protocol, TABLES)
    return (
        spec,
        f"{protocol.name}_{args.backbone}_{spec.train.sha256[:8]}",
        f"the published {args.backbone} under {protocol.name}",
        "",
    )


def draw(
    spec: Evaluate,
    store: Store,
    classes: list[int],
    rows: int,
    name: str,
    what: str,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> Path:
    """Sample with the run's EMA networks, or the published `checkpoint`, and write the image; its caption names the runs, or the file, and the weights.

    ValueError where the samples are latents and their VAE is not to be had.
    """
    import torch

    from experiments.engine.jobs.execute import require_device
    from experiments.engine.runtime.context import Resources, RunContext
    from experiments.engine.sampling.networks import load_decoder, load_networks

    require_device(device)
    decoder = load_decoder(spec.data, torch.device(device))
    records = [store.here.latest(training) for training in spec.trainings]
    context = RunContext(store.run_dir(spec.train), Resources(device, checkpoint=checkpoint))
    model, key = load_networks(spec, context)
    shown = _images(spec, model, classes, rows, device)
    made, axes = figure(0.62 * len(classes), 0.62 * rows + 0.35, rows, len(classes), squeeze=False)
    for place, label in enumerate(classes):
        for line in range(rows):
            axes[line, place].axis("off")
            pixels = (decoder.decode(shown[line, label][None])[0].clamp(-1, 1) + 1) / 2
            axes[line, place].imshow(
                pixels.permute(1, 2, 0).squeeze(-1),
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
        axes[0, place].set_title(str(label))
    runs = "; ".join(
        f"run {record.id}, weights {record.values['weights_sha256']}, commit {(record.provenance['commit'] or 'unknown')[:12]}"
        for record in records
    )
    dirty = " from a tree with uncommitted changes" * any(
        record.provenance["dirty"] for record in records
    )
    origin = (
        f"{runs}{dirty}"
        if records
        else f"{checkpoint.name}, SHA-256 {spec.train.sha256}, key {key}"
    )
    caption = f"Samples of {what}: {rows} of each class, uncurated, {spec.sampler.name} with {spec.sampler.num_steps} steps, guidance {spec.sampler.scale:g} ({origin})."
    folder = store.root / "figures" / "samples"
    save(
        made, folder, name, {CAPTION: caption, RECORDS: " ".join(record.name for record in records)}
    )
    return folder / f"{name}.png"


def _images(
    spec: Evaluate, model: object, classes: list[int], rows: int, device: str
) -> dict[tuple[int, int], Tensor]:
    """Samples (C, H, W) by (row, class); neighbouring classes are drawn in one batch, which changes no image."""
    import torch

    from experiments.engine.sampling.generate import generate_images

    count = spec.data.num_classes
    spec = replace(spec, num=rows * count, labels="balanced")  # image i is of class i mod K
    ordered = sorted(set(classes))
    starts = [label for label in ordered if label - 1 not in ordered]
    ends = [label + 1 for label in ordered if label + 1 not in ordered]
    found = {}
    for line in range(rows):
        for start, end in zip(starts, ends, strict=True):
            within = range(line * count + start, line * count + end)
            for x, y in generate_images(
                spec, model, torch.device(device), min(len(within), 100), within
            ):
                found |= {(line, label): image for image, label in zip(x, y.tolist(), strict=True)}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
