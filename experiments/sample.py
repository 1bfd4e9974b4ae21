"""Draw images of a declared row, or with weights from a file.

    python experiments/sample.py --row DiCo-S --num 50000
    python experiments/sample.py --backbone dit_xl_2 --checkpoint DiT.pt --protocol imagenet256

Every image has its own seed. The set is therefore the same, up to rounding, at any batch size and
number of processes, and after any interruption. `srun` or `torchrun` starts one process per GPU.
Labels follow the protocol's policy.

The command writes an .npz file in ADM's format: arr_0 images, arr_1 labels, shuffled with a fixed
seed. With --png it also writes one PNG per image.

The Evaluate stage of the same row and number scores the same images. With Inception it scores these
very files. On a classifier's features it draws the images again in other batches, so they agree up
to rounding; digits are scored before they are rounded to 8 bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments import ablation, main_results
from experiments.declared.checkpoints import (
    CheckpointFile,
    add_network_options,
    all_tables,
    load_network,
    published_evaluation,
    published_network,
)
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.choices import Choices, add_study_option, choices_from
from experiments.engine.cli import (
    Parser,
    acceleration_flags,
    add_acceleration_options,
    add_device_option,
    add_protocol_option,
    add_results_option,
    open_store,
    run_command,
)
from experiments.engine.data.locate import require_data
from experiments.engine.jobs.job import Job, JobEvent
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.machine.gpu import choose_device, prepare_torch
from experiments.engine.records.files import require_folder, require_space, require_target
from experiments.engine.records.store import Store
from experiments.engine.records.trained import require_trained
from experiments.engine.records.tree import warn_without_commit
from experiments.engine.runtime.progress import Progress, Report, ignore_progress
from experiments.engine.specs.rows import Row, Table, in_order, read_table_name, table_of
from experiments.engine.specs.spec import Evaluate
from experiments.engine.specs.stages import evaluate_stage
from experiments.related import AUTOREGRESSIVE

if TYPE_CHECKING:
    from experiments.engine.runtime.context import RunContext
    from experiments.engine.runtime.group import Group
    from experiments.engine.sampling.samples import SampleSet

TABLES = ablation.TABLES | main_results.TABLES | {AUTOREGRESSIVE.number: AUTOREGRESSIVE}


def main() -> int:
    """Draw the images. The exit status is that of `run_command`, or 137 if a process died."""
    return run_command(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    choices = choices_from(arguments, Choices(TABLES, PROTOCOLS))
    return _draw(_parse(choices, arguments), choices)


def _parse(choices: Choices, arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--table",
        type=read_table_name,
        choices=[table.number for table in in_order(choices.tables)],
        help="table that declares the row; needed if several tables differ on it",
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--row", help="label of the row")
    subject.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: .pt, .safetensors, or a folder of diffusers' DiT",
    )
    parser.add_argument("--backbone", help="registered name of the checkpoint's network")
    add_network_options(parser)
    add_protocol_option(parser, choices.protocols, choices.protocol)
    add_study_option(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="training seed (default: 0)"
    )
    parser.add_argument(
        "--num", type=int, metavar="N", help="number of images (default: as many as are scored)"
    )
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="ancestral, ddim, dpm_solver, dpm_solver_3s or dpm_solver_diffusers; for flows euler, "
        "heun, dopri5, sde and others, which a wrong name lists (default: the protocol's)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of the sampler (default: the protocol's)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".npz file to write (default: samples.npz in the run's folder)",
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="folder for one PNG per image")
    parser.add_argument(
        "--batch",
        type=int,
        default=250,
        metavar="N",
        help="images at a time on a GPU; changes images by rounding alone (default: 250)",
    )
    add_device_option(parser)
    add_results_option(parser)
    add_acceleration_options(parser)

    args = parser.parse_args(arguments)
    numbers = [value for value in (args.batch, args.num, args.steps) if value is not None]
    if min(numbers) < 1:
        parser.error("--num, --steps and --batch take numbers from 1 on")
    if bool(args.checkpoint) != bool(args.backbone):
        parser.error("--checkpoint and --backbone go together")
    if args.row and (args.key or args.option):
        parser.error("--key and --option are of a checkpoint")
    return args


def _draw(args: argparse.Namespace, choices: Choices) -> int:
    store = open_store(args.results)
    if args.checkpoint:
        spec = _with_options(_published_spec(args, choices), args)
    else:
        protocol = choices.protocols[args.protocol]
        table, row = _find_row(args, choices)
        spec = _with_options(evaluate_stage(row, protocol, args.seed), args)
        command = ablation.train_command(table, [row.label], protocol, args.seed, args.results)
        require_trained(spec, store, command)
        require_data(spec.data)

    from experiments.engine.runtime import group as distributed
    from experiments.engine.runtime.context import Resources, RunContext
    from experiments.engine.sampling.generate import require_sampler
    from experiments.engine.sampling.networks import decoder_warnings

    require_sampler(spec)
    device = choose_device(args.device)
    prepare_torch(device)
    resources = Resources(
        device,
        sample_batch=args.batch,
        checkpoint=args.checkpoint,
        **acceleration_flags(args, device),
    )
    store.check_writable()
    warn_without_commit()

    # All ranks draw, and the first one writes the files.
    group = distributed.join_group(device, resources.timeout)
    out = args.out or store.run_dir(spec) / "samples.npz"
    with ExitStack() as held:
        label = f"{args.row or args.checkpoint.name}, {spec.num} images"
        report = _progress_report(label, spec, group, held)
        context = RunContext(store.run_dir(spec.train), resources, group, report=report)
        targets = _Targets(spec, out, args.png)
        samples = _draw_all(spec, store, context, held, targets)
        if not group.first:
            return 0
        samples.pack(out)
        if args.png:
            samples.write_png(args.png)

    warnings = decoder_warnings(spec.data, samples.origin["decoder"])
    for text in [*warnings, *samples.origin.get("warnings", [])]:
        print(f"warning: {text}", file=sys.stderr)
    height, width = samples.shape[1], samples.shape[2]
    print(
        f"{spec.num} images {height} x {width}, {spec.labels} labels, seed {spec.seed}, "
        f"{samples.nfe:g} network evaluations per image: {out}"
    )
    return 0


def _find_row(args: argparse.Namespace, choices: Choices) -> tuple[Table, Row]:
    """Return the row that the options name, and its table. Raise ValueError without a network."""
    protocol = choices.protocols[args.protocol]
    if args.table:
        table = choices.tables[args.table]
    else:
        table = table_of(
            args.row, choices.tables, lambda row: evaluate_stage(row, protocol, args.seed)
        )
    row = table.row(args.row)
    if row.backbone is None:
        raise ValueError(
            f"row {args.row!r} holds published numbers only: there is no network to sample"
        )
    return table, row


def _published_spec(args: argparse.Namespace, choices: Choices) -> Evaluate:
    """Return the evaluation of a file's weights. Raise ValueError if it holds another network."""
    file = CheckpointFile.from_arguments(args)
    protocol = choices.protocols[args.protocol]
    tables = all_tables(TABLES, choices.tables)
    load_network(published_network(file, protocol, tables), file)
    return published_evaluation(file, protocol, tables)


def _with_options(spec: Evaluate, args: argparse.Namespace) -> Evaluate:
    """Return an evaluation with the number of images and the sampler of the options."""
    sampler = replace(
        spec.sampler,
        name=args.sampler or spec.sampler.name,
        num_steps=args.steps or spec.sampler.num_steps,
    )
    return replace(spec, num=args.num or spec.num, sampler=sampler)


def _progress_report(label: str, spec: Evaluate, group: Group, held: ExitStack) -> Report:
    """Return the function that reports progress: on the first rank it prints, elsewhere nothing.

    The progress display is closed with `held`.
    """
    if not group.first:
        return ignore_progress
    job = Job(label, (spec,))
    display = held.enter_context(ProgressDisplay(total=1, lines=True))

    def report(progress: Progress) -> None:
        # The other ranks draw as fast as this one.
        rate = progress.rate * group.world_size
        display.notify(job, JobEvent.PROGRESS, replace(progress, rate=rate))

    return report


@dataclass(frozen=True)
class _Targets:
    """Where a set's images go."""

    spec: Evaluate
    out: Path
    png: Path | None

    def require_room(self) -> None:
        """Raise ValueError if the images cannot be written, or do not fit."""
        from experiments.engine.sampling.samples import image_bytes
        from experiments.engine.sampling.targets import OUT, PNG

        needed = self.spec.num * image_bytes(self.spec)
        require_target(self.out, OUT)
        require_space(self.out.parent, needed, OUT)
        if self.png:
            require_folder(self.png, PNG)
            require_space(self.png, needed, PNG)

    def hold(self, held: ExitStack) -> None:
        """Keep other commands out of the folder of PNGs for as long as `held` is open."""
        from experiments.engine.sampling.targets import hold_folder

        if self.png:
            held.enter_context(hold_folder(self.png))

    def require_own(self, origin: dict[str, Any]) -> None:
        """Raise ValueError if a target holds anything but images of this spec and origin."""
        from experiments.engine.sampling.samples import describe_set, png_names, set_id
        from experiments.engine.sampling.targets import require_own_file, require_own_folder

        require_own_file(self.out, describe_set(self.spec, origin), self.spec.num)
        if self.png:
            require_own_folder(self.png, png_names(self.spec), set_id(self.spec, origin))


def _draw_all(
    spec: Evaluate,
    store: Store,
    context: RunContext,
    held: ExitStack,
    targets: _Targets,
) -> SampleSet:
    """Draw the set on all ranks.

    The first rank holds the run's folder for as long as `held` is open. If one rank fails, all end,
    each with its own error.
    """
    from experiments.engine.runtime.failures import FailureWatch, clear_errors
    from experiments.engine.runtime.heartbeat import claim_run
    from experiments.engine.sampling.samples import generate_samples

    # The first rank claims the folder. All ranks raise if it is refused.
    group, folder = context.group, store.run_dir(spec)
    heartbeat, refusal = None, None
    if group.first:
        try:
            targets.require_room()
            targets.hold(held)
            heartbeat = held.enter_context(claim_run(folder, group.world_size))
            clear_errors(folder)
        except (ValueError, OSError) as error:
            refusal = error
    refusal = group.broadcast(refusal)
    if refusal:
        raise refusal

    def print_error(error: str) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)

    try:
        with FailureWatch(group, folder, print_error):
            context = replace(context, heartbeat=heartbeat)
            return generate_samples(spec, context, targets.require_own)
    except Exception as failure:
        if group.world_size == 1:
            raise
        raise _shared_failure(folder, group, failure) from None


def _shared_failure(folder: Path, group: Group, failure: Exception) -> BaseException:
    """Return the error that all ranks end with, or the exit if a rank died without one."""
    from experiments.engine.runtime import preemption
    from experiments.engine.runtime.failures import RankLost, explain_failure

    try:
        return ValueError(explain_failure(folder, group, failure))
    except RankLost as lost:
        print(f"error: {lost}; run the same command again to continue", file=sys.stderr)
        return SystemExit(preemption.LOST)


if __name__ == "__main__":
    raise SystemExit(main())
