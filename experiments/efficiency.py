"""Count, time and profile the compared systems by one rule for all.

    python experiments/efficiency.py --counts                    parameters and Gflops, with ours
    python experiments/efficiency.py --table 1                   throughput in every numeric mode
    python experiments/efficiency.py --table 1 --task training   of a training step (or: sampling)
    python experiments/efficiency.py --table 1 --task latency    one image, and memory of inference
    python experiments/efficiency.py --table 1 --sweep --rows DiCo-S     over the batch size
    python experiments/efficiency.py --figure 3                  runtime over resolution and size
    python experiments/efficiency.py --claims                    claims about speed, with verdicts
    python experiments/efficiency.py --profile DiCo-S            where the time of a row goes
    python experiments/efficiency.py --predict                   predict GPUs by their data sheets
    python experiments/efficiency.py --memory                    memory of trainings, traced

Everything runs once and becomes a record. `--report` prints existing records and runs nothing.
`--cluster slurm` submits one job per network. With --compile or --graphs, tables, sweeps and the
figure are about compiled networks or CUDA graphs, with records and sheets of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from experiments import related
from experiments.ablation import TABLES as ABLATIONS
from experiments.declared import memory, speed_claims, timings
from experiments.declared.systems import IMAGES, SYSTEMS
from experiments.engine.cli import (
    Outcome,
    Parser,
    acceleration_flags,
    add_format_option,
    add_run_options,
    carry_out,
    device_of,
    exit_status,
    open_store,
    run_command,
)
from experiments.engine.jobs.plan import ListPlan, Plan
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.claims import claims_sheet
from experiments.engine.reporting.efficiency.counts import counts_sheet
from experiments.engine.reporting.efficiency.details import (
    profile_sheets,
    runtime_sheet,
    sweep_sheet,
)
from experiments.engine.reporting.efficiency.images import images_sheet
from experiments.engine.reporting.efficiency.inference.predicted import LatencyRow
from experiments.engine.reporting.efficiency.inference.sheets import (
    inference_sheet,
    latency_sheet,
    predicted_latency_sheet,
)
from experiments.engine.reporting.efficiency.memory import read_needs
from experiments.engine.reporting.efficiency.memory_sheet import (
    MODES,
    Card,
    memory_sheet,
)
from experiments.engine.reporting.efficiency.predicted_sheets import predicted_sheet
from experiments.engine.reporting.efficiency.predictions import Declared, read_predictions
from experiments.engine.reporting.efficiency.speed import Acceleration, speed_sheet
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.rows import read_table_name
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.specs.stages import cost_stages
from experiments.main_results import TABLES

# The row of which the table of memory says in words what it takes.
MEMORY_ASKED = "DiCo-H"
PREDICTED = (TABLES[1], TABLES[2], ABLATIONS[3], ABLATIONS[4])
TIMED = {number: table for number, table in (TABLES | related.TABLES).items() if table.timed}
TIMED |= {table.number: table for table in (related.AUTOREGRESSIVE, related.SMALL_SPEED)}
# Tables 3 and 4 are timed by ablation.py; here the latency of their networks is measured.
WITH_LATENCY = {table.number: table for table in (*PREDICTED, related.TERNARY)}


@dataclass(frozen=True)
class Work:
    """What a command runs, and a function that gives the sheets to print afterwards."""

    plan: Plan
    sheets: Callable[[Store], list[Sheet]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what lacks a record, then print. The exit status is that of `run_command`."""
    return run_command(lambda: _run(_parse(arguments), arguments))


def _run(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    # On Slurm the site file may give a device to a row.
    rows = args.rows or [args.profile or ""]
    device = device_of(args, rows[0])
    store = open_store(args.results)
    if args.predict or args.memory:
        sheets = _predict(args, store) if args.predict else [_memory(args, store)]
        print(render(sheets, args.format))
        return 0
    work = _choose(args, device, store)
    outcome = carry_out(work.plan, args, store, arguments)
    if outcome is not Outcome.ANSWERED:
        print(render(work.sheets(store), args.format))
    return exit_status(outcome)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)

    # The subject comes first, and exactly one must be named.
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--counts", action="store_true", help="count every system")
    subject.add_argument(
        "--table",
        type=read_table_name,
        choices=list(WITH_LATENCY | TIMED),
        help="time the rows of a table of the paper, of its second version (v2-11 to v2-13), of "
        "networks that predict tokens, or of small networks (related-speed)",
    )
    subject.add_argument("--figure", type=int, choices=[3], help="time the networks of a figure")
    subject.add_argument(
        "--claims", action="store_true", help="time and count what the paper's claims are about"
    )
    subject.add_argument("--profile", metavar="ROW", help="profile a row of Table 1, by label")
    subject.add_argument(
        "--predict",
        action="store_true",
        help="predict Tables 1 to 4 on GPUs and write results/predictions (takes about 20 minutes)",
    )
    subject.add_argument(
        "--memory",
        action="store_true",
        help="trace what trainings of Tables 1 to 4 need, as far as results/predictions lacks it "
        "(takes about 10 minutes; with --report: nothing)",
    )

    # The other options narrow the subject or change how it is measured.
    parser.add_argument(
        "--task",
        choices=(*timings.TASKS, timings.LATENCY),
        default="forward",
        help="task to time or profile (default: forward); latency is that of one image, beside "
        "the memory of inference, for Tables 1 to 4 and `ternary`; --predict predicts Tables 1 to "
        "4",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="with --table and --rows: time growing batches until they stop paying",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=timings.MODES["cuda"],
        help="with --table: time only these numeric modes (default: all modes of the device)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="select rows by label; on a CPU this also times large ones",
    )

    parser.add_argument(
        "--budget",
        type=float,
        metavar="GB",
        help="with --memory: gigabytes of each of eight cards (default: 24)",
    )

    # The shared options come last, and some options need others.
    add_format_option(parser)
    add_run_options(parser)
    args = parser.parse_args(arguments)
    _check_combination(parser, args)
    return args


def _check_combination(parser: Parser, args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if args.sweep and not (args.table and args.rows):
        parser.error("--sweep goes with --table and --rows: it times each row at many batch sizes")
    if args.modes and (args.sweep or not args.table):
        parser.error("--modes goes with --table, without --sweep")
    if (args.compile or args.graphs) and not (args.table or args.figure):
        parser.error(
            "--compile and --graphs go with --table or --figure: claims and profiles are about "
            "networks without either"
        )
    if args.budget is not None and not (args.memory and args.budget > 0):
        parser.error("--budget goes with --memory, and takes gigabytes above 0")
    if args.task == timings.LATENCY:
        if args.sweep or not (args.table in WITH_LATENCY or args.predict):
            parser.error(
                "--task latency goes with --table 1, 2, 3, 4 or ternary, or --predict, not --sweep"
            )
    elif args.task != "forward" and not (args.table or args.profile):
        parser.error("--task goes with --table or --profile")
    elif args.table and args.table not in TIMED:
        message = f"--table {args.table} goes with --task latency"
        if args.table in ABLATIONS:
            message += f"; experiments/ablation.py --table {args.table} times its rows"
        parser.error(message)


def _choose(args: argparse.Namespace, device: str, store: Store) -> Work:
    """Return the work that the options ask for."""
    acceleration = Acceleration(**acceleration_flags(args, device))
    if args.counts:
        return _counts()
    if args.claims:
        return _claims(device, store)
    if args.figure:
        return _figure_3(device, acceleration)
    if args.profile:
        return _profile(args, device)
    if args.sweep:
        return _sweeps(args, device, acceleration)
    if args.task == timings.LATENCY:
        return _latency(args, device, acceleration)
    return _table(args, device, acceleration)


def _all_costs() -> tuple[Cost, ...]:
    return tuple(cost for system in speed_claims.COUNTED for cost in system.costs)


def _counts() -> Work:
    costs = (*_all_costs(), *(image.cost for image in IMAGES))
    return Work(
        ListPlan("cpu", costs),
        lambda store: [counts_sheet(SYSTEMS, store), images_sheet(IMAGES, store)],
    )


def _claims(device: str, store: Store) -> Work:
    claims = store.published("claims.csv", ("id",)).values()

    def sheets(store: Store) -> list[Sheet]:
        def stages_of(claim: dict[str, str]) -> list[Timing]:
            return speed_claims.claim_stages(claim, device)

        return [claims_sheet(device, speed_claims.COUNTED, stages_of, store)]

    return Work(ListPlan(device, _all_costs(), speed_claims.jobs(claims, device)), sheets)


def _figure_3(device: str, acceleration: Acceleration) -> Work:
    plan = ListPlan(device, alone=timings.figure_3_jobs(device, acceleration))
    stages = timings.figure_3(device, acceleration)
    return Work(plan, lambda store: [runtime_sheet(stages, device, store.here, acceleration)])


def _profile(args: argparse.Namespace, device: str) -> Work:
    row = TIMED[1].row(args.profile)
    profiles = timings.profiles(row, device, args.task)
    jobs = (timings.ceilings_job(device), timings.profile_job(row, device, args.task))
    return Work(
        ListPlan(device, alone=jobs),
        lambda store: profile_sheets(row.label, profiles, device, args.task, store.here),
    )


def _predict(args: argparse.Namespace, store: Store) -> list[Sheet]:
    """Predict every row of Tables 1 to 4 and every claim's networks, and write the files."""
    # Prediction needs torch, which no other part of this script does before its jobs run.
    from experiments.engine.timing.meta.predict import write_all, write_latency

    tell = partial(print, file=sys.stderr)
    if args.task == timings.LATENCY:
        declared = latency_rows()
        write_latency(declared, store, tell)
        return [
            predicted_latency_sheet(declared, store.root, store.here),
            inference_sheet(declared, store.root, store.here),
        ]

    rows = predicted_rows(store)
    write_all(rows, predicted_on_cpu(store), store, tell)
    predictions = read_predictions(store.root)
    return [
        predicted_sheet(task, rows, predictions, store.root, store.here) for task in timings.TASKS
    ]


def predicted_rows(store: Store) -> list[Declared]:
    """Return what is predicted on GPUs: every row of Tables 1 to 4, and the claims' networks."""
    claims = store.published("claims.csv", ("id",)).values()
    declared: list[Declared] = []
    for table in PREDICTED:
        published = store.published(table.published, table.key)
        for row in table.rows:
            if row.backbone:
                printed = published[row.published]["throughput_img_s"] if row.published else ""
                rate = float(printed) if printed else None
                declared += timings.predicted(table, row, "cuda", rate)
    return declared + speed_claims.predicted(claims)


def latency_rows(device: str = "cuda") -> list[LatencyRow]:
    """Return whose latency is predicted, or measured where a CPU is given time: Tables 1 to 4."""
    return [row for table in PREDICTED for row in timings.latency_rows(table, table.rows, device)]


def predicted_on_cpu(store: Store) -> list[Declared]:
    """Return what is predicted on a CPU: the timings of Tables 1 to 4 that are committed."""
    return [
        declared
        for table in PREDICTED
        for row in table.rows
        if row.backbone
        for declared in timings.predicted(table, row, "cpu")
        if store.reference.latest(declared.stages["fp32"])
    ]


def _memory(args: argparse.Namespace, store: Store) -> Sheet:
    """Trace what the predictions lack, write them, and return the table."""
    declared = memory.memory_rows(PREDICTED)
    rows = [row for row in declared if args.rows is None or row.label in args.rows]
    if not rows:
        known = ", ".join(dict.fromkeys(repr(row.label) for row in declared))
        raise ValueError(f"Tables 1 to 4 have no network as any of --rows; known: {known}")
    if not args.report:
        # Tracing needs torch.
        from experiments.engine.timing.memory.predict import write_all

        trainings = [memory.in_precision(row.train, mode) for row in rows for mode in MODES]
        small = [] if args.rows else memory.small_trainings(PREDICTED)
        tell = partial(print, file=sys.stderr)
        write_all([*trainings, *small], store.root, tell)
    card = Card(args.budget) if args.budget else None
    return memory_sheet(rows, read_needs(store.root), MEMORY_ASKED, card)


def _sweeps(args: argparse.Namespace, device: str, acceleration: Acceleration) -> Work:
    table = TIMED[args.table]
    rows = [row for row in map(table.row, args.rows) if row.backbone]
    swept = [
        timings.swept_row(row, table.baseline, device, args.task, acceleration) for row in rows
    ]
    jobs = tuple(job for row in swept for job in timings.sweeps(row))
    return Work(
        ListPlan(device, alone=jobs),
        lambda store: [sweep_sheet(row, store.here) for row in swept],
    )


def _latency(args: argparse.Namespace, device: str, acceleration: Acceleration) -> Work:
    table = WITH_LATENCY[args.table]
    named = args.rows is not None
    selected = [table.row(label) for label in args.rows] if named else table.rows
    if args.modes:
        timings.require_modes(args.modes, device, acceleration)
    rows = timings.latency_rows(table, selected, device, named, acceleration, args.modes)
    return Work(
        ListPlan(device, alone=timings.latency_jobs(rows)),
        lambda store: [latency_sheet(rows, device, store.root, store.here, acceleration)],
    )


def _table(args: argparse.Namespace, device: str, acceleration: Acceleration) -> Work:
    table = TIMED[args.table]
    selected = [table.row(label) for label in args.rows] if args.rows else table.rows
    rows = [row for row in selected if row.backbone]

    # Rows are counted as well as timed, since the table shows both.
    costs = tuple(cost for row in rows for cost in cost_stages(row))
    stages = timings.stages(
        table,
        rows,
        device,
        args.task,
        named=args.rows is not None,
        acceleration=acceleration,
    )

    # The user may ask for some modes only.
    if args.modes:
        timings.require_modes(args.modes, device, acceleration)
        stages = [stage for stage in stages if stage.precision in args.modes]

    jobs = (timings.ceilings_job(device), *timings.jobs(rows, stages))
    timed = timings.timed_table(table, rows, device, args.task, acceleration)
    return Work(ListPlan(device, costs, jobs), lambda store: [speed_sheet(timed, store)])


if __name__ == "__main__":
    raise SystemExit(main())
