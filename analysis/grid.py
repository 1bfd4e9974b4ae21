"""Draw uncurated samples as one image: `python -m analysis.grid --table 4 --row DiCo-S`.

Or those of a published checkpoint:

    python -m analysis.grid --backbone dico_xl --checkpoint DiCo-XL.pt --protocol imagenet256_guided

A column is a class and a row a sample. The r-th sample of class c, of K classes, has the seed of
image c + K r of the run's evaluation, so nothing is chosen. The VAE that $DICO_VAE names decodes
latents.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.figures.style import figure, save
from analysis.query import TRAINED, trained_row
from experiments.ablation import train_command
from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    load_network,
    published_evaluation,
    published_network,
)
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, add_device_option, add_results_option, run_command
from experiments.engine.records.store import Record, Store
from experiments.engine.records.trained import require_trained
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import table_of
from experiments.engine.specs.spec import Checkpoint, Evaluate
from experiments.engine.specs.stages import Protocol, evaluate_stage
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from torch import Tensor, nn

# Keys of a PNG's text: what the image shows, and the names of its trainings' records.
CAPTION = "Description"
RECORDS = "Records"

CELL = 0.62  # inches of a sample
CLASSES = 10  # columns, unless --classes says otherwise
BATCH = 100


@dataclass(frozen=True)
class Subject:
    """The networks whose samples are drawn."""

    # The evaluation that begins with these samples.
    spec: Evaluate
    # Of the image's file.
    name: str
    # Of the networks, in the caption.
    title: str
    # Trains the networks; empty if they are published.
    command: str = ""
    # The published file.
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Layout:
    """Which samples are drawn."""

    classes: list[int]
    # Samples per class.
    rows: int
    device: str = "cpu"


def main() -> int:
    """Run the command. Exit status: 0 drawn, 2 bad input."""
    return run_command(draw_chosen)


def draw_chosen() -> int:
    """Draw what the arguments name and print the file."""
    args = _parser().parse_args()
    protocol = PROTOCOLS[args.protocol]
    store = Store(args.results, REPOSITORY / "results" / "reference")
    if args.checkpoint or args.backbone:
        subject = published_subject(args, protocol)
    else:
        subject = trained_subject(args, protocol)
    if args.scale is not None:
        subject = with_scale(subject, args.scale)
    layout = choose_layout(args, subject.spec)

    if not all(store.here.latest(training) for training in subject.spec.trainings):
        raise ValueError(f"no finished run of {args.row!r} here; train it with: {subject.command}")
    require_trained(subject.spec, store, subject.command)
    print(f"wrote {draw(subject, layout, store)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)

    # The subject is a declared row or a published checkpoint.
    parser.add_argument(
        "--table",
        type=int,
        choices=list(TRAINED),
        help="table that declares the row (default: the one that does)",
    )
    parser.add_argument("--row", help="label of the row whose run is drawn")
    parser.add_argument(
        "--backbone", help="registered name of a published checkpoint's network, e.g. dico_xl"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="published checkpoint, .pt or .safetensors"
    )
    add_network_options(parser)

    # The protocol and the seed say which of its trainings is meant.
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="digits",
        help="protocol of the training, or of a checkpoint's sampling (default: digits)",
    )
    parser.add_argument("--seed", type=int, help="training seed of --row (default: 0)")

    # The other options choose the pictures and the machine.
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        metavar="C",
        help="classes to draw, in this order (default: the first ten)",
    )
    parser.add_argument("--rows", type=int, default=8, help="samples per class (default: 8)")
    parser.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="scale of classifier-free guidance (default: the protocol's)",
    )
    add_device_option(parser, default="cpu")
    add_results_option(parser, use_environment=False)
    return parser


def choose_layout(args: argparse.Namespace, spec: Evaluate) -> Layout:
    """Return which samples the arguments name.

    Raises:
        ValueError: if a class does not exist, or there are no rows.
    """
    count = spec.data.num_classes
    classes = args.classes or list(range(min(CLASSES, count)))
    if args.rows < 1 or not all(0 <= label < count for label in classes):
        raise ValueError(
            f"--rows takes a number from 1 on and --classes labels from 0 to {count - 1}"
        )
    return Layout(classes, args.rows, args.device)


def trained_subject(args: argparse.Namespace, protocol: Protocol) -> Subject:
    """Return the networks of a declared row.

    Raises:
        ValueError: if the row is not named, or options of a checkpoint are.
    """
    if args.row is None or args.key or args.option:
        raise ValueError(
            "name --row, or --backbone and --checkpoint; --key and --option are for a checkpoint"
        )

    # The row alone names its table, unless several tables declare it differently.
    seed = args.seed or 0
    if args.table:
        table = TRAINED[args.table]
    else:
        table = table_of(args.row, TRAINED, lambda row: evaluate_stage(row, protocol, seed))

    return Subject(
        evaluate_stage(trained_row(table, args.row), protocol, seed),
        _file_name(protocol.name, f"table{table.number}", args.row, f"seed{seed}"),
        f"{args.row} of Table {table.number} on {protocol.name}, training seed {seed}",
        command=train_command(table, [args.row], protocol, seed, args.results),
    )


def published_subject(args: argparse.Namespace, protocol: Protocol) -> Subject:
    """Return the network of a published checkpoint, as evaluate_checkpoint.py scores it.

    Raises:
        ValueError: if the checkpoint or its backbone is not named, or a row is named too.
    """
    # A checkpoint stands alone: options of a declared row have no meaning beside it.
    of_row = (args.row, args.table, args.seed)
    if not (args.checkpoint and args.backbone) or any(value is not None for value in of_row):
        raise ValueError(
            "--backbone and --checkpoint go together, and without --table, --row and --seed"
        )

    file = CheckpointFile.from_arguments(args)
    load_network(published_network(file, protocol, TABLES), file)  # refuses another network
    spec = published_evaluation(file, protocol, TABLES)
    assert isinstance(spec.train, Checkpoint), spec

    return Subject(
        spec,
        _file_name(protocol.name, args.backbone, spec.train.sha256[:8]),
        f"the published {args.backbone} under {protocol.name}",
        checkpoint=args.checkpoint,
    )


def with_scale(subject: Subject, scale: float) -> Subject:
    """Return a subject that is sampled with another scale of guidance."""
    sampler = replace(subject.spec.sampler, scale=scale)
    return replace(
        subject,
        spec=replace(subject.spec, sampler=sampler),
        name=_file_name(subject.name, f"scale{scale:g}"),
    )


def _file_name(*parts: str) -> str:
    return "_".join(parts).replace("/", "").replace(" ", "_")


def draw(subject: Subject, layout: Layout, store: Store) -> Path:
    """Sample with the EMA networks of a run, or a published one, and write the image.

    The image's caption names the runs, or the file, and the weights.

    Raises:
        ValueError: if the samples are latents and their VAE is missing.
    """
    import torch

    from experiments.engine.machine.gpu import prepare_torch
    from experiments.engine.runtime.context import Resources, RunContext
    from experiments.engine.sampling.networks import load_decoder, load_networks

    # What samples, and what decodes the samples.
    prepare_torch(layout.device)
    spec = subject.spec
    decoder = load_decoder(spec.data, torch.device(layout.device))
    resources = Resources(layout.device, checkpoint=subject.checkpoint)
    model, key, warnings = load_networks(spec, RunContext(store.run_dir(spec.train), resources))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    samples = sample(spec, model, layout)

    # A panel per sample.
    columns = len(layout.classes)
    height = CELL * layout.rows + 0.35
    drawing, axes = figure(CELL * columns, height, layout.rows, columns, squeeze=False)
    for column, label in enumerate(layout.classes):
        axes[0, column].set_title(str(label))
        for row in range(layout.rows):
            _show(axes[row, column], decoder.decode(samples[row, label][None])[0])

    # What the file says of its run.
    records = [store.here.latest(training) for training in spec.trainings]
    known = [record for record in records if record]
    text = {
        CAPTION: caption_of(subject, layout, known, key),
        RECORDS: " ".join(record.name for record in known),
    }
    folder = store.root / "figures" / "samples"
    save(drawing, folder, subject.name, text)
    return folder / f"{subject.name}.png"


def _show(axes: Any, image: Tensor) -> None:
    """Show an image (C, H, W) with values from -1 to 1."""
    pixels = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).squeeze(-1)
    axes.axis("off")
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def caption_of(subject: Subject, layout: Layout, records: list[Record], key: str) -> str:
    """Return the caption, which names the runs or the published file."""
    if records:
        origin = "; ".join(_describe_run(record) for record in records)
        if any(record.provenance["dirty"] for record in records):
            origin += " from a tree with uncommitted changes"
    else:
        weights = subject.spec.train
        assert subject.checkpoint and isinstance(weights, Checkpoint), subject
        origin = f"{subject.checkpoint.name}, SHA-256 {weights.sha256}, key {key}"
    sampler = subject.spec.sampler
    return (
        f"Samples of {subject.title}: {layout.rows} of each class, uncurated, "
        f"{sampler.name} with {sampler.num_steps} steps, guidance {sampler.scale:g} ({origin})."
    )


def _describe_run(record: Record) -> str:
    commit = (record.provenance["commit"] or "unknown")[:12]
    return f"run {record.id}, weights {record.values['weights_sha256']}, commit {commit}"


def sample(spec: Evaluate, model: nn.Module, layout: Layout) -> dict[tuple[int, int], Tensor]:
    """Return the samples (C, H, W) by (row, class).

    Neighbouring classes share a batch, which changes no image.
    """
    import torch

    from experiments.engine.runtime.group import ALONE
    from experiments.engine.sampling.forecast import announce_sampling
    from experiments.engine.sampling.generate import generate_images

    count = spec.data.num_classes
    # With balanced labels, image i is of class i mod K.
    spec = replace(spec, num=layout.rows * count, labels="balanced")
    device = torch.device(layout.device)
    num = layout.rows * len(layout.classes)
    announce_sampling(spec, model, num, len(layout.classes), device, ALONE)
    samples: dict[tuple[int, int], Tensor] = {}
    for row in range(layout.rows):
        for first, last in _runs(layout.classes):
            images = range(row * count + first, row * count + last + 1)
            batches = generate_images(spec, model, device, min(len(images), BATCH), images)
            for x, y in batches:
                for image, label in zip(x, y.tolist(), strict=True):
                    samples[row, label] = image
    return samples


def _runs(classes: list[int]) -> list[tuple[int, int]]:
    """Return the first and the last class of each run of neighbouring classes."""
    chosen = sorted(set(classes))
    firsts = [label for label in chosen if label - 1 not in chosen]
    lasts = [label for label in chosen if label + 1 not in chosen]
    return list(zip(firsts, lasts, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
