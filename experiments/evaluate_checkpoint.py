"""Score a published checkpoint: `python experiments/evaluate_checkpoint.py --backbone dico_xl --checkpoint DiCo-XL.pt --protocol imagenet256`.

Loads the weights strictly and without running code from the file, draws the protocol's images, scores them and prints the
paper's values beside; the record says what was measured. `--dry-run` lists what is missing on this machine and what the
run would cost on it; `--cluster slurm` sends it. Running again goes on where a stopped run was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.checkpoint import options_of
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import (
    Outcome,
    Parser,
    acceleration_flags,
    add_run_options,
    carry_out,
    chosen_device,
    exit_status,
    require_device,
    run_command,
)
from experiments.engine.data.locate import (
    inception_path,
    missing_features,
    reference_path,
    require_features,
    vae_source,
)
from experiments.engine.jobs.plan import Listed
from experiments.engine.jobs.pool import Job
from experiments.engine.records.manifest import score_name
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.reporting.lookup import SCORES as CLASSIFIED
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import (
    FACTOR,
    Backbone,
    Checkpoint,
    Diffusion,
    Evaluate,
    Sampler,
    is_latent,
    spec_id,
)
from experiments.engine.specs.stages import Protocol, cost_stages, sampler_of
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from torch import nn

PAPERS = {
    "imagenet256": (1, 8),
    "imagenet512": (2, 9),
}  # tables of scores; where the second has a row of the first, it is rounded
SCORES = ("fid", "fid_corrected", "sfid", "is", "precision", "recall", "kid")


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables: what is declared of it, what is published, and whether its images were guided."""

    row: Row
    values: dict[str, str]
    guided: bool

    @property
    def networks(self) -> list[str]:
        """More than one where the row is a system."""
        return [
            part.backbone.name
            for part in (self.row, self.row.classifier, self.row.upsampler)
            if part
        ]

    def text(self) -> str:
        steps = (
            f"{int(self.values['train_steps']):,} training steps, "
            if self.values.get("train_steps")
            else ""
        )
        return f"{self.values['source']}, {self.values['model']}, {steps}{_words(self.guided)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, plan or print; the exit status is that of `run_command`."""
    return run_command(lambda: _main(_parse(arguments), arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="registered name, e.g. dico_xl")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help=".pt or .safetensors"
    )
    parser.add_argument(
        "--protocol",
        choices=[name for name, protocol in PROTOCOLS.items() if not protocol.small],
        required=True,
    )
    add_network_options(parser)
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images at a time on a GPU (default: 250, on Slurm the site's sample_batch)",
    )
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.batch is not None and args.batch < 1:
        parser.error("--batch takes a number from 1 on")
    return args


def _main(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    protocol, device = PROTOCOLS[args.protocol], chosen_device(args, args.backbone)
    resources = (
        {"checkpoint": args.checkpoint.resolve()}
        | ({"sample_batch": args.batch} if args.batch else {})
        | acceleration_flags(args, device)
    )
    spec, model, key = evaluation_of(args, protocol)
    seconds = None
    if args.dry_run:
        if args.cluster != "slurm":
            require_device(device)
        text, seconds = _plan(spec, model, device if args.cluster != "slurm" else None)
        print(f"{args.checkpoint.name}: weights under the key {key}\n{text}")
    store = Store(args.results, REPOSITORY / "results" / "reference")
    job = Job(f"{args.checkpoint.name}, {spec.num} images", (spec,), row=args.backbone)
    outcome = carry_out(
        Listed(
            device,
            together=(job,),
            resources=resources,
            seconds={spec_id(spec): seconds} if seconds else {},
        ),
        args,
        store,
        arguments,
        lambda: require_features(spec),
    )
    if outcome is Outcome.DONE and (record := store.here.latest(spec)):
        print(
            "\n".join(
                [
                    f"{args.checkpoint.name} (key {key}), {args.protocol}, manifest {record.values['manifest']['hash']}",
                    *_beside(record.values, args.backbone, spec, store),
                ]
            )
        )
    elif outcome is Outcome.DONE:
        raise ValueError(
            f"there is no record of {args.checkpoint.name} under {args.protocol} yet; leave out --report"
        )
    return exit_status(outcome)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What `evaluation_of` takes beside --backbone and --checkpoint."""
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


def evaluation_of(args: argparse.Namespace, protocol: Protocol) -> tuple[Evaluate, nn.Module, str]:
    """The stage that scores a published file, its network, and the key under which its weights lie; ValueError for a file of another network."""
    from experiments.engine.data.image_files import file_sha256

    data = protocol.data
    row = _declared(args.backbone, protocol)
    own = (
        row.backbone.options
        if row and (row.backbone.name, cost_stages(row)[0].size) == (args.backbone, data.size)
        else {}
    )
    size = dict(input_size=data.size, in_channels=data.channels, num_classes=data.num_classes)
    backbone = Backbone(args.backbone, own | size | options_of(args.option))
    model, key = _load(backbone, args)
    weights = Checkpoint(
        backbone,
        data,
        file_sha256(args.checkpoint),
        args.key or Checkpoint.key,
        row.method.diffusion if row else Diffusion(),
    )
    return (
        Evaluate(
            weights,
            sampler_of(row, protocol) if row else protocol.sampler,
            protocol.num,
            protocol.features,
            protocol.labels,
        ),
        model,
        key,
    )


def _declared(name: str, protocol: Protocol) -> Row | None:
    """The row whose objective and sampler are the network's: its own at this size, guided where there is one, else of its size, else of its family."""
    rows = [
        row
        for table in TABLES.values()
        for row in table.rows
        if row.method and row.backbone.name.partition("_")[0] == name.partition("_")[0]
    ]
    return min(
        rows,
        key=lambda row: (
            row.backbone.name != name,
            cost_stages(row)[0].size != protocol.data.size,
            sampler_of(row, protocol).scale == 1,
        ),
        default=None,
    )


def _load(backbone: Backbone, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network, and the key under which the file keeps its weights."""
    import torch

    import backbones

    with torch.random.fork_rng(devices=[]):
        model = backbones.build(backbone.name, **backbone.options)
    key = backbones.load_published(model, args.checkpoint, args.key)
    return model.eval(), key


def _plan(spec: Evaluate, model: nn.Module, device: str | None) -> tuple[str, float | None]:
    """What is missing, and the seconds of drawing N images on this device, if it is the one: the network timed here, times its evaluations."""
    lines = [
        f"{spec_id(spec)}  {spec.num} images, {spec.sampler.name}, {spec.sampler.num_steps} steps, guidance scale {spec.sampler.scale:g}, {spec.labels} labels, {spec.precision}"
    ]
    lines += _state(spec) or ["nothing is missing"]
    passes, total = spec.sampler.num_steps * (1 if spec.sampler.scale == 1 else 2), None
    if spec.sampler.name == "dopri5":
        lines.append(
            "sampling: its steps are as many as each image needs, so what it takes is unknown"
        )
    elif device:
        seconds = _seconds_per_pass(spec, model, device)
        total = spec.num * passes * seconds
        lines.append(
            f"sampling: {passes} evaluations an image at {seconds * 1000:.3g} ms each on this device: about {total / 3600:.3g} hours; decoding and features come on top"
        )
    else:
        lines.append(
            f"sampling: {passes} evaluations an image; what one costs, this command says on a node, without --cluster slurm"
        )
    gigabytes = (
        spec.num
        * 3
        * (FACTOR * spec.data.size if is_latent(spec.data) else spec.data.size) ** 2
        / 1e9
    )
    return "\n".join([*lines, f"disk: {gigabytes:.1f} GB of images"]), total


def _state(spec: Evaluate) -> list[str]:
    """What the run lacks, what of its files it would refuse, and what its record would warn of: each file is opened as the run opens it."""
    import torch

    from experiments.engine.sampling.samples import decoder_warnings, load_decoder
    from experiments.engine.scoring import inception
    from experiments.engine.scoring.stage import require_reference

    missing, warnings, checks = missing_features(spec), [], []
    if spec.features == "inception":
        checks += [lambda: inception.load(inception_path(), "cpu")] * (
            inception_path().is_file() and find_spec("torch_fidelity") is not None
        )
        path = reference_path(spec.data)
        checks += [lambda: require_reference(spec.data)] * (path is None or path.is_file())
    if is_latent(spec.data) and find_spec("diffusers"):
        from experiments.engine.data.autoencoder import missing_vae

        lacking = missing_vae(vae_source())
        missing += filter(None, [lacking])
        checks += [
            lambda: warnings.extend(
                decoder_warnings(spec.data, load_decoder(spec.data, torch.device("cpu"))[1])
            )
        ] * (not lacking)
    unusable = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            unusable.append(str(error))
    return [
        f"{word}: {text}"
        for word, texts in (("missing", missing), ("unusable", unusable), ("warning", warnings))
        for text in texts
    ]


def _seconds_per_pass(spec: Evaluate, model: nn.Module, device: str) -> float:
    """Seconds an image and evaluation: the fastest of three small batches after a warm-up."""
    import torch

    from experiments.engine.numerics.precision import precision

    data, batch = spec.data, 64 if device == "cuda" else 1
    model.to(device)
    given = (
        torch.zeros(batch, data.channels, data.size, data.size, device=device),
        torch.zeros(batch, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    times = []
    with torch.inference_mode(), precision(spec.precision, torch.device(device)):
        for _ in range(4):
            started = time.perf_counter()
            model(*given).sum().item()  # reading the number waits for the device
            times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


def _beside(values: dict[str, Any], backbone: str, spec: Evaluate, store: Store) -> list[str]:
    """Our scores, each with the paper's value for the same network, guided or not as the images were, where it has one."""
    rows, guided = _published(backbone, spec, store), spec.sampler.scale != 1
    alike = next((one for one in rows if one.guided == guided and len(one.networks) == 1), None)
    named = (
        {key: score_name(key.partition("_")[0], values["num"]) for key in SCORES}
        if spec.features == "inception"
        else {key: key for key in CLASSIFIED[spec.features]}
    )
    lines = []
    for key, name in named.items():
        if (value := values.get(key)) is None or value != value:
            continue
        error, known = values.get(f"{key}_se"), alike and alike.values.get(key)
        spread = f" ± {error:.4f}" if error is not None and error == error else ""
        words = ", without its finite-N bias" if key == "fid_corrected" else ""
        lines.append(
            f"  {name:14} {value:.4f}{spread}{words}" + (f"   paper {known}" if known else "")
        )
    lines += [f"  network evaluations per image: {values['nfe']:.4g}"] if "nfe" in values else []
    notes = (
        [f"paper: {alike.text()}", *_drawn_otherwise(alike.row, spec)]
        if alike
        else [_no_such_row(rows, guided)]
    )
    return [
        *lines,
        *(f"  {text}" for text in notes),
        *(f"  warning: {text}" for text in values.get("warnings", [])),
    ]


def _published(backbone: str, spec: Evaluate, store: Store) -> list[Published]:
    """The paper's rows of this network at this resolution, the longest trained first.

    Where a table does not say whether a row is guided, its paper's sampler does.
    """
    found = []
    for table in (TABLES[number] for number in PAPERS.get(spec.data.name, ())):
        published = store.published(table.published, table.key)
        for row in (row for row in table.rows if row.backbone):
            values, sampler = published[row.published], row.method and row.method.sampler
            guided = (
                values["cfg"] == "yes"
                if values.get("cfg")
                else sampler is not None and (sampler.scale, sampler.classifier_scale) != (1, 0)
            )
            found.append(Published(row, values, guided))
    return sorted(
        (one for one in found if backbone in one.networks),
        key=lambda one: -int(one.values.get("train_steps") or 0),
    )


def _drawn_otherwise(row: Row, spec: Evaluate) -> list[str]:
    """What the sampler does otherwise than the row's own paper says, if it says anything, and what else is to be known of the row."""
    notes = [f"{row.label}: {row.note}"] if row.note else []
    if row.method:
        own = sampler_of(row, PROTOCOLS[f"{spec.data.name}_own"])
        ours, theirs = (
            {f.name: getattr(sampler, f.name) for f in fields(Sampler)}
            for sampler in (spec.sampler, own)
        )
        if other := ", ".join(
            f"{name} {ours[name]}, not {theirs[name]}"
            for name in ours
            if ours[name] != theirs[name]
        ):
            notes.append(
                f"drawn otherwise than its own recipe says: {other} (--protocol {spec.data.name}_own follows it)"
            )
    return notes


def _no_such_row(rows: list[Published], guided: bool) -> str:
    """Why no value stands beside ours: the paper has the network within a system, under other guidance, or not at all."""
    if not rows:
        return "the paper has no such row"
    first = rows[0]
    if len(first.networks) > 1:
        scores = ", ".join(
            f"{score_name(key, 50_000)} {first.values[key]}"
            for key in SCORES
            if first.values.get(key)
        )
        return f"the paper has this network only within a system of {', '.join(first.networks)}: {first.text()}: {scores}"
    return f"the paper has no {_words(guided)} row of this network, only {first.text()}"


def _words(guided: bool) -> str:
    return "guided" if guided else "unguided"


if __name__ == "__main__":
    raise SystemExit(main())
