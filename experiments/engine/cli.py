"""The shared command line. It chooses among declarations: no hyper-parameter has a flag.

This module does not import torch, so `--help`, `--dry-run` and `--report` answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from experiments.engine.choices import (
    Choices,
    add_study_argument,
    add_table_option,
    labels_of,
)
from experiments.engine.cluster import slurm
from experiments.engine.cluster.launch import Cluster, require_sources, run_plan
from experiments.engine.cluster.nested import require_no_rank, without_ranks
from experiments.engine.cluster.site import load_site, warn_of_unknown_rows
from experiments.engine.cluster.status import status
from experiments.engine.jobs.plan import Plan, TablePlan, describe
from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.gpu import choose_device, require_device
from experiments.engine.machine.lifetime import bind_to_launcher, unwound
from experiments.engine.machine.streams import replace_unprintable
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.code import keep_study
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.specs.rows import Table, TableName
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import FACTOR
from experiments.engine.specs.stages import Protocol, cost_stages, declared_rows

DEVICES = ("cpu", "cuda")


class Outcome(Enum):
    """How a command's work ended."""

    ANSWERED = "the options asked for an answer alone, and it is printed"
    DONE = "every stage has its record"
    FAILED = "a stage failed"


# ---- Commands


def main(
    tables: dict[TableName, Table],
    protocols: dict[str, Protocol],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run, plan or print one table. The exit status is that of `run_command`."""
    return run_command(lambda: run_table(Choices(tables, protocols), description, arguments))


def run_command(command: Callable[[], int]) -> int:
    """Run a command and report bad input as one line on standard error.

    Args:
        command: returns 0 when everything is done and 1 when a stage failed.

    Returns:
        The exit status: the command's own, 2 for bad input, 130 after an interrupt.
        SIGTERM ends the process with status 143, and a closed terminal with 129.
    """
    replace_unprintable()
    bind_to_launcher()
    try:
        with unwound():
            return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the table has closed the pipe, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def run_table(
    choices: Choices, description: str | None, arguments: Sequence[str] | None = None
) -> int:
    """Run, plan or print one of these tables, and return the exit status.

    Raises:
        ValueError: for bad input.
    """
    args = _parse_table_options(choices, description, arguments)
    store = open_store(args.results)
    plan = _select(choices.tables[args.table], choices.protocols[args.protocol], args)
    selection = plan.selection

    # A label in the site file that nothing declares is most likely a typing error.
    if args.cluster == Cluster.SLURM:
        warn_of_unknown_rows(labels_of(choices.tables.values()))

    outcome = carry_out(
        plan, args, store, arguments, lambda: require_sources(selection), args.workers
    )
    if outcome is not Outcome.ANSWERED:
        print(render(report_sheets(selection, store), args.format))
    return exit_status(outcome)


def _select(table: Table, protocol: Protocol, args: argparse.Namespace) -> TablePlan:
    """Return the plan of the selected rows. Raise ValueError if one command cannot run them."""
    rows = list(table.rows) if args.rows is None else [table.row(label) for label in args.rows]
    rows = declared_rows(rows, protocol, named=args.rows is not None)

    # A paper's own recipe holds for one resolution.
    size = cost_stages(table.baseline)[0].size
    if protocol.own and size != protocol.data.size:
        raise ValueError(
            f"the recipes of table {table.number} are for latents of side {size}, but protocol "
            f"{protocol.name} has {protocol.data.size}; choose imagenet{FACTOR * size}_own"
        )

    # Counts, timings and scores of one sheet come from one kind of device.
    devices = {device_of(args, row.label) for row in rows}
    if len(devices) > 1:
        raise ValueError(
            "the site file puts some of these rows on GPUs and others on CPUs; "
            "use --rows to select rows of one kind"
        )
    (device,) = devices
    named = args.rows is not None
    selection = Selection(table, rows, protocol, args.seeds, device, named)
    return TablePlan(selection, resource_flags(args, device))


def carry_out(
    plan: Plan,
    args: argparse.Namespace,
    store: Store,
    arguments: Sequence[str] | None,
    require_sources: Callable[[], None] | None = None,
    workers: int | None = None,
) -> Outcome:
    """Do with a plan what the options of `add_run_options` ask for.

    Args:
        arguments: the command line that was parsed, None for the process's own.
        require_sources: raises ValueError if something that the jobs read is missing.
        workers: trainings that run side by side on this machine.
    """
    answer = _answer(plan, args, store)
    if answer is not None:
        print(answer)
        return Outcome.ANSWERED
    if args.report:
        return Outcome.DONE

    if require_sources:
        require_sources()
    keep_study(store.root)
    if args.cluster == Cluster.SLURM:
        print(slurm.send(plan, store, _command_line(arguments)))
        return Outcome.ANSWERED

    require_no_rank()
    require_device(plan.device)
    store.check_writable()
    with without_ranks():
        all_done = run_plan(plan, store, Cluster(args.cluster), workers)
    store.refresh()
    return Outcome.DONE if all_done else Outcome.FAILED


def _answer(plan: Plan, args: argparse.Namespace, store: Store) -> str | None:
    """Return what --dry-run, --status or --cancel prints, or None without these options."""
    if args.dry_run:
        text = describe(plan, store)
        if args.cluster == Cluster.SLURM:
            text += "\n" + slurm.describe(plan, store)
        return text
    if args.status:
        return status(plan, store)
    if args.cancel:
        return slurm.cancel(plan, store)
    return None


def _command_line(arguments: Sequence[str] | None) -> str:
    """Return this command as a user types it."""
    script = os.path.relpath(sys.argv[0])
    return shlex.join(["python", script, *(sys.argv[1:] if arguments is None else arguments)])


def exit_status(outcome: Outcome) -> int:
    """Return 1 if a stage failed, else 0."""
    return 1 if outcome is Outcome.FAILED else 0


# ---- What options mean


def open_store(results: Path | None) -> Store:
    """Open a results folder beside the reference records of this repository."""
    return Store(results, REPOSITORY / "results" / "reference")


def device_of(args: argparse.Namespace, row: str) -> str:
    """Return the device of a row: that of --device, of the site on Slurm, or of this machine."""
    if args.cluster != Cluster.SLURM:
        return choose_device(args.device)

    # The devices of this login node say nothing of the cluster's nodes.
    device = load_site(row).device
    if args.device not in (None, device):
        raise ValueError(
            f"--device {args.device} contradicts the site file, whose nodes compute on {device}; "
            "leave it out, or change gpus_per_node in slurm/site.toml"
        )
    return device


def acceleration_flags(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return --compile and --graphs, where they are set, as resources of the trainer.

    On Slurm they are added to what the site file sets.
    """
    if args.graphs and device != "cuda":
        raise ValueError(
            f"CUDA graphs need a GPU, but this command uses {device}; leave out --graphs"
        )
    return {name: True for name in ("compile", "graphs") if getattr(args, name)}


def resource_flags(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return what the options of a command that trains say of the trainer's resources."""
    flags = acceleration_flags(args, device)
    if args.watch_every is not None:
        if args.watch_every < 0:
            raise ValueError("--watch-every takes a number of steps, or 0 for never")
        flags["watch_every"] = args.watch_every
    return flags


# ---- Options


class Parser(argparse.ArgumentParser):
    """Show the description as it is written, and report bad arguments as one line."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parse_table_options(
    choices: Choices, description: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser = Parser(description)
    if choices.of_study:
        add_study_argument(parser)
    add_table_option(parser, choices)
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="select rows by label, also the '(alt)' rows that a table leaves out",
    )
    add_protocol_option(parser, choices.protocols, choices.protocol)
    seeds = " ".join(map(str, choices.seeds))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(choices.seeds),
        metavar="N",
        help=f"training seeds (default: {seeds})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="trainings side by side (default: one per core, or one on a GPU)",
    )
    add_format_option(parser)
    add_run_options(parser)

    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds takes different numbers from 0 on")
    return args


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that runs stages: where, on what, and whether at all."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run and what it would cost"
    )
    parser.add_argument(
        "--report", action="store_true", help="print from existing records, run nothing"
    )
    parser.add_argument(
        "--cluster",
        choices=[str(cluster) for cluster in Cluster],
        default=str(Cluster.HERE),
        help="here: worker processes; local: submitit on this machine; "
        "debug: one process, for breakpoints; slurm: submit (default: here)",
    )
    parser.add_argument(
        "--status", action="store_true", help="print the state of every run: waiting, running, ..."
    )
    parser.add_argument(
        "--cancel", action="store_true", help="cancel the jobs that this command submitted"
    )
    add_device_option(parser, "the GPU if there is one; on Slurm that of the site file")
    add_results_option(parser)
    add_acceleration_options(parser)
    parser.add_argument(
        "--watch-every",
        type=int,
        metavar="STEPS",
        help="steps between two looks at gradients and activations of every block; 0: never "
        "(default: 200)",
    )


def add_protocol_option(
    parser: argparse.ArgumentParser,
    protocols: dict[str, Protocol] | Sequence[str],
    default: str = "digits",
) -> None:
    parser.add_argument(
        "--protocol",
        choices=list(protocols),
        default=default,
        help=f"data, recipe, sampler and scores (default: {default})",
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="format of printed tables (default: text)"
    )


def add_device_option(
    parser: argparse.ArgumentParser,
    meaning: str = "the GPU if there is one",
    default: str | None = None,
) -> None:
    """Add --device. `meaning` says what runs without it, when `default` is None."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=default,
        help=f"device to compute on (default: {default or meaning})",
    )


def add_results_option(parser: argparse.ArgumentParser, use_environment: bool = True) -> None:
    """Add --results, which defaults to $RESULTS where `use_environment` is set, else to results."""
    environment = read_variable("RESULTS") if use_environment else None
    default = "$RESULTS, else results" if use_environment else "results"
    parser.add_argument(
        "--results",
        type=Path,
        default=environment,
        metavar="DIR",
        help=f"results folder (default: {default})",
    )


def add_acceleration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="compile networks (torch.compile)")
    parser.add_argument("--graphs", action="store_true", help="run steps as CUDA graphs (GPU only)")
