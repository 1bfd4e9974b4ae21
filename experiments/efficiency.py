"""What the compared systems cost and how fast they run, by one rule for all.

    python experiments/efficiency.py --counts                      parameters and Gflops of every system, published and ours
    python experiments/efficiency.py --table 1                     throughput of its rows in every numeric mode
    python experiments/efficiency.py --table 1 --task training     of a step of the trainer; sampling: of guided sampling
    python experiments/efficiency.py --table 1 --sweep --rows DiCo-S     over the batch size, to the best
    python experiments/efficiency.py --figure 3                    runtime over resolution and model size
    python experiments/efficiency.py --claims                      the paper's claims about speed and Gflops, with verdicts
    python experiments/efficiency.py --profile DiCo-S              where the time of a row goes, and a trace

Everything runs once and is kept as a record; `--report` prints what there is without running anything, `--cluster slurm` sends
every network as a job of its own. Tables, sweeps and the figure with --compile or --graphs are timings, records and sheets of their
own, of compiled or recorded networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from experiments.declared import speed_claims
from experiments.declared import timings as speed
from experiments.declared.systems import SYSTEMS, counts_sheet
from experiments.engine.cli import (
    Parser,
    acceleration_flags,
    add_run_options,
    carry_out,
    chosen_device,
    run_command,
)
from experiments.engine.jobs.plan import Listed, Plan
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.stages import cost_stages
from experiments.main_results import TABLES

TIMED = {number: table for number, table in TABLES.items() if table.timed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what lacks a record, then print; the exit status is `guarded`'s."""
    return run_command(lambda: _main(_parse(arguments), arguments))


def _main(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    store = Store(args.results, REPOSITORY / "results" / "reference")
    device = chosen_device(args, (args.rows or [args.profile or ""])[0])
    plan, sheets = _choose(args, device, store)
    good = carry_out(plan, args, store, arguments)
    if good is not None:
        print(render(sheets(), args.format))
    return 1 if good is False else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--counts", action="store_true", help="count every system and print the table"
    )
    what.add_argument(
        "--table", type=int, choices=list(TIMED), help="time the rows of a table of the paper"
    )
    what.add_argument("--figure", type=int, choices=[3], help="time what the figure shows")
    what.add_argument(
        "--claims",
        action="store_true",
        help="time and count what the paper's claims are about, and judge them",
    )
    what.add_argument("--profile", metavar="ROW", help="profile a row of Table 1, by label")
    parser.add_argument(
        "--task",
        choices=speed.TASKS,
        default="forward",
        help="what is timed or profiled (default: forward)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="with --table and --rows: over the batch size, until it stops paying",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=speed.MODES["cuda"],
        help="with --table: only these numeric modes are timed (default: all of the device's)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these rows, by label; also large ones on a CPU",
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.sweep and not (args.table and args.rows):
        parser.error(
            "--sweep goes with --table and --rows: it times each of them at many batch sizes"
        )
    if args.modes and (args.sweep or not args.table):
        parser.error("--modes goes with --table, without --sweep")
    if (args.compile or args.graphs) and not (args.table or args.figure):
        parser.error(
            "--compile and --graphs go with --table or --figure: claims and profiles are about networks as they are called"
        )
    if args.task != "forward" and not (args.table or args.profile):
        parser.error("--task goes with --table or --profile")
    return args


def _choose(
    args: argparse.Namespace, device: str, store: Store
) -> tuple[Plan, Callable[[], list[Sheet]]]:
    """What has to run, and a function that gives the sheets to print."""
    how = acceleration_flags(args, device)
    costs = tuple(cost for system in SYSTEMS for cost in system.costs)
    if args.counts:
        return Listed("cpu", costs), lambda: [counts_sheet(store)]
    if args.claims:
        claims = store.published("claims.csv", ("id",)).values()
        return Listed(device, costs, speed_claims.jobs(claims, device)), lambda: [
            speed_claims.claims_sheet(device, store)
        ]
    if args.figure:
        return Listed(device, alone=speed.figure_3_jobs(device, **how)), lambda: [
            speed.runtime_sheet(device, store, **how)
        ]
    table = TIMED[args.table or 1]
    if args.profile:
        row = table.row(args.profile)
        return Listed(
            device, alone=(speed.ceilings_job(device), speed.profile_job(row, device, args.task))
        ), lambda: speed.profile_sheets(row, device, args.task, store)
    rows = [
        row
        for row in ([table.row(label) for label in args.rows] if args.rows else table.rows)
        if row.backbone
    ]
    if args.sweep:
        sweeps = tuple(
            sweep
            for row in rows
            for sweep in speed.sweeps(row, table.baseline, device, args.task, **how)
        )
        return Listed(device, alone=sweeps), lambda: [
            speed.sweep_sheet(row, table.baseline, device, args.task, store, **how) for row in rows
        ]
    counts = tuple(cost for row in rows for cost in cost_stages(row))
    timed = speed.jobs(table, rows, device, args.task, args.rows is not None, args.modes, **how)
    return Listed(device, counts, (speed.ceilings_job(device), *timed)), lambda: [
        speed.speed_sheet(table, rows, device, args.task, store, **how)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
