"""Measure this suite's own speed.

loop     counts, the report, and on request the main job, checkpoints, precision and recall
loader   latents per second of the loader alone
steps    training and sampling steps beside those of another implementation
kernels  every kernel beside its reference and beside a copy of memory
small    training of small networks beside another commit of this suite
gpu      everything that a GPU has to measure, most important first
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import tempfile
import textwrap
import time
from collections.abc import Sequence

from experiments.declared import benchmarks as declared
from experiments.declared.help import benchmarks as benchmark_help
from experiments.engine.benchmarks.footprint import measure_footprint, measure_start
from experiments.engine.benchmarks.session import Session
from experiments.engine.benchmarks.spec import Loader, Neighbours, Steps
from experiments.engine.cli import (
    Parser,
    acceleration_flags,
    add_acceleration_options,
    add_device_option,
    add_results_option,
    require_device,
    run_command,
)
from experiments.engine.jobs.pool import available_cores
from experiments.engine.machine.gpu import prepare_torch
from experiments.engine.records.files import require_target
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY, warn_without_commit

ABLATION = REPOSITORY / "experiments" / "ablation.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; the exit status is that of `run_command`."""
    return run_command(lambda: _benchmark(arguments))


def _benchmark(arguments: Sequence[str] | None) -> int:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_loop, _add_loader, _add_steps, _add_kernels, _add_small, _add_gpu):
        add(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _add_loop(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "loop", description=benchmark_help.LOOP, help="the suite's own loops"
    )
    parser.add_argument(
        "--main-job",
        action="store_true",
        help="also run the whole main job, and print its seconds and peak memory",
    )

    # These flags narrow the run to one part.
    parser.add_argument(
        "--checkpoints", action="store_true", help="measure only what a checkpoint costs"
    )
    parser.add_argument("--neighbours", action="store_true", help="time only precision and recall")

    add_device_option(parser, default="cpu")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        metavar=("SAMPLES", "REFERENCE", "DIM"),
        help="sizes for --neighbours (default: 5000 2000 2048, on CUDA 50000 10000 2048)",
    )
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_loop)


def _run_loop(args: argparse.Namespace) -> int:
    if args.neighbours:
        _run_neighbours(args)
    elif args.checkpoints:
        _run_checkpoints(args)
    else:
        seconds, imports_torch = measure_start(ABLATION, ["--table", "4", "--report"])
        print(f"--report: {seconds:.2f} s, torch imported: {imports_torch}")
        _run_counts()
        if args.main_job:
            _run_main_job()
    return 0


def _run_neighbours(args: argparse.Namespace) -> None:
    from experiments.engine.benchmarks.neighbours import measure_neighbours

    prepare_torch(args.device)
    store = _open_store(args.results)
    samples, reference, dim = args.sizes or declared.NEIGHBOUR_SIZES[args.device]
    for arithmetic in ("exact", "half"):
        measure_neighbours(Neighbours(arithmetic, args.device, samples, reference, dim), store)


def _run_checkpoints(args: argparse.Namespace) -> None:
    from experiments.engine.benchmarks.checkpoints import measure_stall

    prepare_torch(args.device)
    measure_stall(declared.STALLS[args.device], _open_store(args.results))


def _run_counts() -> None:
    """Count all networks and all rows of ablations, and print the time it takes."""
    import backbones
    from experiments.ablation import TABLES
    from experiments.engine.specs.spec import Backbone, Cost
    from experiments.engine.specs.stages import cost_stage
    from experiments.engine.timing.scale_cost import count_declared

    networks = []
    for name in backbones.list_backbones():
        options = backbones.options_of(name)
        size, channels = options["input_size"], options["in_channels"]
        networks.append(Cost(Backbone(name), size, channels, options["num_classes"]))
    rows = [cost_stage(row) for table in TABLES.values() for row in (*table.rows, *table.outside)]
    for name, specs in (("registered networks", networks), ("rows of ablations", rows)):
        started = time.perf_counter()
        for spec in specs:
            count_declared(spec)
        seconds = time.perf_counter() - started
        print(f"counts: {len(specs)} {name} in {seconds:.1f} s", flush=True)


def _run_main_job() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ABLATION), "--table", "4", "--results", folder]
        job = measure_footprint(command)
    print(
        f"main job: exit status {job.status}, {job.seconds:.0f} s, "
        f"at most {job.peak_bytes / 2**30:.2f} GiB on {available_cores()} cores"
    )


def _add_loader(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "loader", description=benchmark_help.LOADER, help="the loader of latents"
    )
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_loader)


def _run_loader(args: argparse.Namespace) -> int:
    from experiments.engine.benchmarks.loader import measure_loader

    measure_loader(Loader(), _open_store(args.results))
    return 0


def _add_steps(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "steps", description=benchmark_help.STEPS, help="training and sampling steps"
    )

    # These options choose what is compared.
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(declared.STEP_NETWORKS),
        metavar="BACKBONE",
        help=f"registered networks (default: {' '.join(declared.STEP_NETWORKS)})",
    )
    _add_against_option(parser, "other implementations to compare with")
    add_device_option(parser, default="cpu")

    # These options choose how the networks run, and what is timed.
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "tf32", "bf16"),
        default=["fp32"],
        help="numeric modes (default: fp32)",
    )
    parser.add_argument("--batch", type=int, help="images (default: 8 on a CPU, 64 on a GPU)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("training", "sampling"),
        default=["training", "sampling"],
        help="what to time (default: both)",
    )
    add_acceleration_options(parser)
    parser.add_argument("--rounds", type=int, default=7, help="rounds in turn (default: 7)")
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_steps, parser=parser)


def _run_steps(args: argparse.Namespace) -> int:
    import backbones
    from experiments.engine.benchmarks.steps import Other, measure_steps

    # Refuse what cannot be measured before anything is timed.
    others = {}
    for text in args.against:
        network, file, constructor = _parse_other(text)
        others[network] = Other(file, constructor)
    if args.rounds < 3 or (args.batch or 1) < 1:
        args.parser.error("--rounds must be at least 3 and --batch at least 1")
    acceleration_flags(args, args.device)
    store = _open_store(args.results)
    prepare_torch(args.device)
    for network in args.networks:
        backbones.require_kind(network, backbones.Kind.BACKBONE)
        if network not in others:
            print(
                f"{network}: without --against {network}=FILE:NAME "
                "no step of another implementation is measured",
                flush=True,
            )

    batch = args.batch or declared.STEP_BATCH[args.device]
    good = True
    for mode in args.precision:
        for network in args.networks:
            for task in args.tasks:
                spec = Steps(network, task, batch, args.device, mode, args.compile, args.graphs)
                timed = measure_steps(
                    spec, others.get(network), args.rounds, store, declared.TARGETS
                )
                good = good and timed
    return 0 if good else 1


def _parse_other(text: str) -> tuple[str, Path, str]:
    """Split BACKBONE=FILE:NAME."""
    network, _, place = text.partition("=")
    file, _, constructor = place.rpartition(":")
    if not constructor.isidentifier() or not Path(file).is_file():
        raise ValueError(f"--against takes BACKBONE=FILE:NAME with an existing file, got {text!r}")
    return network, Path(file), constructor


def _add_kernels(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "kernels", description=benchmark_help.KERNELS, help="every kernel beside its reference"
    )

    # These options choose what is timed.
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=declared.KERNELS,
        default=list(declared.KERNELS),
        metavar="KERNEL",
        help=f"operations to time (default: all): {', '.join(declared.KERNELS)}",
    )
    add_device_option(parser, default="cpu")

    # These options choose how it is timed.
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "tf32", "bf16"),
        help="numeric modes (default: fp32; on CUDA all)",
    )
    parser.add_argument("--batch", type=int, help="samples (default: 1 on a CPU, 64 on CUDA)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs (default: 5)")
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_kernels, parser=parser)


def _run_kernels(args: argparse.Namespace) -> int:
    batch = declared.KERNEL_BATCH[args.device] if args.batch is None else args.batch
    if args.runs < 2 or batch < 1:
        args.parser.error("--runs must be at least 2 and --batch at least 1")
    store = _open_store(args.results)
    prepare_torch(args.device)

    from experiments.engine.benchmarks.kernels import Setup, measure_kernels

    modes = args.precision or declared.KERNEL_MODES[args.device]
    setup = Setup(args.device, batch, args.runs)
    return 0 if measure_kernels(args.kernels, modes, setup, store, declared.TARGETS) else 1


def _add_small(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "small", description=benchmark_help.SMALL, help="training of small networks"
    )
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument(
        "--against", type=Path, metavar="TREE", help="a checkout of the commit to compare with"
    )
    other.add_argument(
        "--stacked", type=int, metavar="N", help="train N seeds as one stacked network"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows of Table 4 (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turn (default: 5)")
    parser.add_argument("--steps", type=int, default=6, help="steps per round (default: 6)")
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_small, parser=parser)


def _run_small(args: argparse.Namespace) -> int:
    from experiments.ablation import TABLES
    from experiments.engine.benchmarks.small.against import Rounds, measure_small
    from experiments.engine.benchmarks.small.stacked import measure_stacked

    # Refuse what cannot be measured before anything is timed.
    if args.rounds < 3 or args.steps < 1:
        args.parser.error("--rounds must be at least 3 and --steps at least 1")
    if args.stacked is not None and args.stacked < 2:
        args.parser.error("--stacked takes at least 2 seeds")
    table = TABLES[declared.SMALL_TABLE]
    rows = [table.row(label) for label in args.rows] if args.rows else list(table.rows)
    store = _open_store(args.results)
    rounds = Rounds(args.rounds, args.steps)
    for protocol in declared.SMALL_PROTOCOLS:
        if args.stacked:
            measure_stacked(rows, protocol, args.stacked, rounds, store)
        else:
            measure_small(rows, protocol, args.against, rounds, store)
    return 0


def _add_gpu(commands: argparse._SubParsersAction[Parser]) -> None:
    parts = "Parts, in order: " + "; ".join(declared.gpu_parts("cuda", [])) + "."
    description = benchmark_help.GPU + textwrap.fill(parts, 98, break_on_hyphens=False)

    parser = commands.add_parser("gpu", description=description, help="all a GPU has to measure")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="minutes for all of it (default: 9)"
    )
    _add_against_option(parser, "other implementations to compare steps with")
    parser.add_argument("--from", dest="first", metavar="PART", help="begin with this part")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE.tar.gz", help="also keep all records in this file"
    )
    add_device_option(parser, default="cuda")
    add_results_option(parser, use_environment=False)
    parser.set_defaults(run=_run_gpu, parser=parser)


def _run_gpu(args: argparse.Namespace) -> int:
    if args.bundle:
        require_target(args.bundle, "--bundle")
    end = time.monotonic() + 60 * args.minutes
    parts = declared.gpu_parts(args.device, args.against)
    if args.first:
        if args.first not in parts:
            args.parser.error(f"--from takes a part: {'; '.join(parts)}")
        names = list(parts)
        parts = {name: parts[name] for name in names[names.index(args.first) :]}
    store = _open_store(args.results)
    require_device(args.device)
    return 0 if Session(end, store, args.bundle).run(parts) else 1


def _add_against_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--against", nargs="*", default=[], metavar="BACKBONE=FILE:NAME", help=text)


def _open_store(results: Path | None) -> Store:
    """Open a results folder that can be written."""
    store = Store(results)
    store.check_writable()
    warn_without_commit()
    return store


if __name__ == "__main__":
    raise SystemExit(main())
