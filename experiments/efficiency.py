"""What the compared systems cost and how fast they run, by one rule for all.

    python experiments/efficiency.py --counts                      parameters and Gflops of every system, published and ours
    python experiments/efficiency.py --table 1                     throughput of its rows in every numeric mode
    python experiments/efficiency.py --table 1 --task training     of a step of the trainer; sampling: of guided sampling
    python experiments/efficiency.py --table 1 --sweep --rows DiCo-S     over the batch size, to the best
    python experiments/efficiency.py --figure 3                    runtime over resolution and model size
    python experiments/efficiency.py --claims                      the paper's claims about speed and Gflops, with verdicts
    python experiments/efficiency.py --profile DiCo-S              where the time of a row goes, and a trace

Everything runs once and is kept as a record; `--report` prints what there is without running anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import speed, speed_claims
from experiments.engine.cli import Parser, guarded, require_device
from experiments.engine.launch import Job, available_cores, run_here
from experiments.engine.progress import Progress
from experiments.engine.render import FORMATS, render
from experiments.engine.report import Sheet
from experiments.engine.rows import Row, Table
from experiments.engine.spec import Stage, spec_id
from experiments.engine.store import REPOSITORY, Store
from experiments.main_results import TABLES
from experiments.protocols import cost_stages
from experiments.systems import SYSTEMS, counts_sheet

TIMED = {number: table for number, table in TABLES.items() if table.timed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what lacks a record, then print; the exit status is `guarded`'s."""
    return guarded(lambda: _main(_parse(arguments)))


def _main(args: argparse.Namespace) -> int:
    store = Store(args.results, REPOSITORY / "results" / "reference")
    stages, sheets = _choose(args, store)
    good = True
    if not args.report:
        require_device(args.device)
        store.check_writable()
        missing = list({spec_id(stage): stage for stage in stages if store.latest(stage) is None}.values())
        with Progress(total=len(missing)) as progress:
            good = _run(missing, args, store, progress)
        store.refresh()
    print(render(sheets(), args.format))
    return 0 if good else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--counts", action="store_true", help="count every system and print the table")
    what.add_argument("--table", type=int, choices=list(TIMED), help="time the rows of a table of the paper")
    what.add_argument("--figure", type=int, choices=[3], help="time what the figure shows")
    what.add_argument("--claims", action="store_true", help="time and count what the paper's claims are about, and judge them")
    what.add_argument("--profile", metavar="ROW", help="profile a row of Table 1, by label")
    parser.add_argument("--task", choices=speed.TASKS, default="forward", help="what is timed or profiled (default: forward)")
    parser.add_argument("--sweep", action="store_true", help="with --table and --rows: over the batch size, until it stops paying")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, by label; also large ones on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidia0").exists() else "cpu", help="default: the GPU if there is one")
    parser.add_argument("--report", action="store_true", help="print from records without running anything")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="results folder (default: results)")
    args = parser.parse_args(arguments)
    if args.sweep and not (args.table and args.rows):
        parser.error("--sweep goes with --table and --rows: it times each of them at many batch sizes")
    if args.task != "forward" and not (args.table or args.profile):
        parser.error("--task goes with --table or --profile")
    return args


def _choose(args: argparse.Namespace, store: Store) -> tuple[list[Stage], Callable[[], list[Sheet]]]:
    """What has to run, and a function that gives the sheets to print."""
    if args.counts:
        return [cost for system in SYSTEMS for cost in system.costs], lambda: [counts_sheet(store)]
    if args.claims:
        claims = store.published("claims.csv", ("id",)).values()
        timed = [stage for claim in claims if claim["metric"] == "throughput" for stage in speed_claims.claim_stages(claim, args.device)]
        light = [stage for stage in timed if args.device == "cuda" or not {"xl", "h"} & set(stage.backbone.name.split("_"))]
        return [cost for system in SYSTEMS for cost in system.costs] + light, lambda: [speed_claims.claims_sheet(args.device, store)]
    if args.figure:
        return speed.figure_3(args.device), lambda: [speed.runtime_sheet(args.device, store)]
    table = TIMED[args.table or 1]
    if args.profile:
        row = table.row(args.profile)
        return [*speed.ceilings(args.device), *speed.profiles(row, args.device, args.task)], lambda: speed.profile_sheets(row, args.device, args.task, store)
    rows = _rows(table, args.rows)
    if args.sweep:
        return [stage for row in rows for stage in speed.sweep(row, table.baseline, args.device, args.task)], lambda: [
            speed.sweep_sheet(row, table.baseline, args.device, args.task, store) for row in rows
        ]
    costs = [cost for row in rows for cost in cost_stages(row)]
    stages = [*costs, *speed.ceilings(args.device), *speed.stages(table, rows, args.device, args.task, args.rows is not None)]
    return stages, lambda: [speed.speed_sheet(table, rows, args.device, args.task, store)]


def _rows(table: Table, labels: list[str] | None) -> list[Row]:
    return [row for row in ([table.row(label) for label in labels] if labels else table.rows) if row.backbone]


def _run(stages: Sequence[Stage], args: argparse.Namespace, store: Store, progress: Progress) -> bool:
    """One after another in a process each, alone on the machine; of a sweep, no larger batch once one did not pay."""
    if not args.sweep:
        return not stages or run_here([Job("efficiency", tuple(stages))], store.root, args.device, 1, available_cores(), progress.notify)
    tried: dict[str, float] = {}
    for stage in sorted(stages, key=lambda stage: stage.batch):
        group = f"{stage.backbone} {stage.precision}"
        if tried.get(group, 1.0) <= 0:
            continue
        run_here([Job("sweep", (stage,))], store.root, args.device, 1, available_cores(), progress.notify)
        store.refresh()
        record = store.latest(stage)
        rate = record.values["images_per_s"] if record else 0.0
        tried[group] = -1.0 if rate < 1.02 * tried.get(group, 0.0) else rate
    return True


if __name__ == "__main__":
    raise SystemExit(main())
