"""Score a published checkpoint.

    python experiments/evaluate_checkpoint.py --backbone dico_xl --checkpoint DiCo-XL.pt \\
        --protocol imagenet256

This loads the weights strictly and without running code from the file, samples the protocol's
images, scores them, and prints the paper's values beside. The record says what was measured.
A folder of diffusers' DiT does for a file, and --study names a study with protocols of its own.
`--dry-run` lists what is missing on this machine and estimates the cost. `--cluster slurm` submits
the job. A stopped run continues when the command is run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    all_tables,
    load_network,
    published_evaluation,
    published_network,
)
from experiments.declared.paper_scores import lines_beside_paper
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.choices import Choices, add_study_option, choices_from
from experiments.engine.cli import (
    Outcome,
    Parser,
    acceleration_flags,
    add_run_options,
    carry_out,
    device_of,
    exit_status,
    run_command,
)
from experiments.engine.data.locate import (
    inception_path,
    missing_features,
    reference_path,
    require_features,
    vae_source,
)
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.plan import ListPlan
from experiments.engine.machine.gpu import prepare_torch
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.latent_space import space_of
from experiments.engine.specs.spec import Evaluate, is_latent, spec_id
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from torch import nn

TIMED_PASSES = 3  # passes that are timed for the estimate of the cost, after one that warms up


@dataclass(frozen=True)
class Estimate:
    """What sampling all images takes."""

    # One line for the plan.
    text: str
    # Seconds on this device; None if they are unknown.
    seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, plan or print; the exit status is that of `run_command`."""
    return run_command(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    choices = choices_from(arguments, Choices(TABLES, PROTOCOLS))
    return _evaluate(_parse(choices, arguments), choices, arguments)


def _parse(choices: Choices, arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="registered name, e.g. dico_xl")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help=".pt or .safetensors, or a folder",
    )
    parser.add_argument(
        "--protocol",
        choices=[name for name, protocol in choices.protocols.items() if not protocol.small],
        required=True,
    )
    add_study_option(parser)
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


def _evaluate(args: argparse.Namespace, choices: Choices, arguments: list[str]) -> int:
    file = CheckpointFile.from_arguments(args)
    protocol = choices.protocols[args.protocol]
    tables = all_tables(TABLES, choices.tables)
    device = device_of(args, args.backbone)
    resources: dict[str, Any] = {"checkpoint": args.checkpoint.resolve()}
    if args.batch:
        resources["sample_batch"] = args.batch
    resources |= acceleration_flags(args, device)

    # A file of another network is refused before anything else.
    model, key = load_network(published_network(file, protocol, tables), file)
    spec = published_evaluation(file, protocol, tables)
    seconds = {}
    if args.dry_run:
        estimate = _estimate(spec, model, args, device)
        print(f"{args.checkpoint.name}: weights under the key {key}")
        print("\n".join([*_describe(spec), estimate.text, _describe_disk(spec)]))
        if estimate.seconds:
            seconds[spec_id(spec)] = estimate.seconds

    # Run, print or submit it, as the options say.
    store = Store(args.results, REPOSITORY / "results" / "reference")
    job = Job(f"{args.checkpoint.name}, {spec.num} images", (spec,), row=args.backbone)
    plan = ListPlan(device, together=(job,), resources=resources, seconds=seconds)
    outcome = carry_out(plan, args, store, arguments, lambda: require_features(spec))
    if outcome is Outcome.DONE:
        _print_scores(args, spec, key, store)
    return exit_status(outcome)


def _print_scores(args: argparse.Namespace, spec: Evaluate, key: str, store: Store) -> None:
    record = store.here.latest(spec)
    if record is None:
        raise ValueError(
            f"there is no record of {args.checkpoint.name} under {args.protocol} yet; "
            "leave out --report"
        )
    manifest = record.values["manifest"]["hash"]
    print(f"{args.checkpoint.name} (key {key}), {args.protocol}, manifest {manifest}")
    print("\n".join(lines_beside_paper(record.values, args.backbone, spec, store, TABLES)))


def _describe(spec: Evaluate) -> list[str]:
    """Return what would be sampled, and what is missing for it."""
    sampler = spec.sampler
    head = (
        f"{spec_id(spec)}  {spec.num} images, {sampler.name}, {sampler.num_steps} steps, "
        f"guidance scale {sampler.scale:g}, {spec.labels} labels, {spec.precision}"
    )
    return [head, *(_missing(spec) or ["nothing is missing"])]


def _describe_disk(spec: Evaluate) -> str:
    pixels = space_of(spec.data).factor * spec.data.size if is_latent(spec.data) else spec.data.size
    return f"disk: {spec.num * 3 * pixels**2 / 1e9:.1f} GB of images"


def _missing(spec: Evaluate) -> list[str]:
    """Return what the run lacks, what it would refuse, and what its record would warn of.

    Each file is opened as the run opens it.
    """
    missing = missing_features(spec)
    warnings: list[str] = []
    checks = _feature_checks(spec, warnings)

    # Latents need a VAE to decode them.
    if is_latent(spec.data) and find_spec("diffusers"):
        from experiments.engine.data.autoencoder import missing_vae

        lacking = missing_vae(vae_source())
        if lacking:
            missing.append(lacking)
        else:
            checks.append(lambda: warnings.extend(_decoder_warnings(spec)))

    unusable = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            unusable.append(str(error))
    return [
        *(f"missing: {text}" for text in missing),
        *(f"unusable: {text}" for text in unusable),
        *(f"warning: {text}" for text in warnings),
    ]


def _feature_checks(spec: Evaluate, warnings: list[str]) -> list[Callable[[], object]]:
    """Return what opens the extractor and the reference, as far as they are there.

    The extractor adds what the record would warn of to `warnings`.
    """
    from experiments.engine.scoring.inception import load_inception
    from experiments.engine.scoring.stage import require_reference

    if spec.features != "inception":
        return []
    checks: list[Callable[[], object]] = []
    if inception_path().is_file() and find_spec("torch_fidelity"):
        checks.append(lambda: warnings.extend(load_inception(inception_path(), "cpu").warnings))
    path = reference_path(spec.data)
    if path is None or path.is_file():
        checks.append(lambda: require_reference(spec.data))
    return checks


def _decoder_warnings(spec: Evaluate) -> list[str]:
    import torch

    from experiments.engine.sampling.networks import decoder_warnings, load_decoder

    decoder = load_decoder(spec.data, torch.device("cpu"))
    return decoder_warnings(spec.data, decoder.identity)


def _estimate(spec: Evaluate, model: nn.Module, args: argparse.Namespace, device: str) -> Estimate:
    """Estimate sampling by the network's time on this device times its evaluations."""
    sampler = spec.sampler
    if args.cluster != "slurm":
        prepare_torch(device)
    if sampler.name == "dopri5":
        return Estimate(
            "sampling: its steps are as many as each image needs, so what it takes is unknown"
        )

    # Guidance evaluates the network twice per step. A login node says nothing of the others.
    evaluations = sampler.num_steps * (1 if sampler.scale == 1 else 2)
    if args.cluster == "slurm":
        return Estimate(
            f"sampling: {evaluations} evaluations an image; what one costs, this command says on "
            "a node, without --cluster slurm"
        )
    seconds = _seconds_per_pass(spec, model, device)
    total = spec.num * evaluations * seconds
    return Estimate(
        f"sampling: {evaluations} evaluations an image at {seconds * 1000:.3g} ms each on this "
        f"device: about {total / 3600:.3g} hours; decoding and features come on top",
        total,
    )


def _seconds_per_pass(spec: Evaluate, model: nn.Module, device: str) -> float:
    """Return seconds per image and evaluation: the fastest of three batches after a warm-up."""
    import torch

    from experiments.engine.numerics.precision import precision

    data = spec.data
    batch = 64 if device == "cuda" else 1
    model.to(device)
    x = torch.zeros(batch, data.channels, data.size, data.size, device=device)
    t = torch.zeros(batch, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)

    times = []
    with torch.inference_mode(), precision(spec.precision, torch.device(device)):
        for _ in range(1 + TIMED_PASSES):
            started = time.perf_counter()
            model(x, t, y).sum().item()  # reading the number waits for the device
            times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


if __name__ == "__main__":
    raise SystemExit(main())
