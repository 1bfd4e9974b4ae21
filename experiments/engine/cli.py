"""The command line that every experiment script shares. It chooses among declarations; no hyper-parameter has a flag.

No torch here: `--help`, `--dry-run` and `--report` answer at once, and runs happen in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments.engine.launch import Job, available_cores, run_here
from experiments.engine.progress import Progress
from experiments.engine.render import FORMATS, render
from experiments.engine.report import comparison_sheet, main_sheet
from experiments.engine.sources import require_data, require_features
from experiments.engine.spec import Evaluate, Row, Stage, Table, Timing, Train, kind_of, spec_id
from experiments.engine.store import REPOSITORY, Store
from experiments.protocols import PROTOCOLS, Protocol, cost_stages, evaluate_stage, timed_rows, timing_stage, train_stage

CLUSTERS = ("here",)


def main(tables: dict[int, Table], description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run, plan or print a table. Exit status: 0 done, 1 some stage failed, 2 bad input, 130 interrupted."""
    try:
        return _main(tables, description, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the table has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: cannot write results ({error.strerror}); free space or choose another folder with --results", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _main(tables: dict[int, Table], description: str | None, arguments: Sequence[str] | None) -> int:
    args = _parse(tables, description, arguments)
    table, protocol, store = tables[args.table], PROTOCOLS[args.protocol], Store(args.results, REPOSITORY / "results" / "reference")
    rows, named = _choose(table, args.rows), args.rows is not None
    networks = [row for row in rows if row.backbone]  # the others are published numbers alone
    device = args.device or ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    good = True
    if args.dry_run:
        print(_plan(table, networks, protocol, args.seeds, device, store, named))
        return 0
    if not args.report:
        if not table.counts_only:
            require_data(protocol.data)
            require_features(evaluate_stage(table.baseline, protocol, 0))
        _require_device(device)
        store.check_writable()
        good = _run(table, networks, protocol, args.seeds, device, store, args.workers, named)
        store.refresh()
    sheets = [main_sheet(table, rows, protocol, args.seeds, device, store)]
    if not table.counts_only and protocol.small:
        sheets.append(comparison_sheet(table, networks, protocol, args.seeds, device, store))
    print(render(sheets, args.format))
    return 0 if good else 1


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parse(tables: dict[int, Table], description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = ", ".join(f"{number} ({table.title})" for number, table in tables.items())
    parser.add_argument("--table", type=int, choices=list(tables), required=True, help=f"table of the paper: {numbers}")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, by label; also reaches the '(alt)' rows")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="digits", help="data, recipe, sampler and scores (default: digits)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="training seeds (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, what is done and what it will cost")
    parser.add_argument("--report", action="store_true", help="print the table from records without running anything")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the printed table")
    parser.add_argument("--cluster", choices=CLUSTERS, default="here", help="where to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="trainings side by side (default: one a core, on a GPU one)")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="results folder (default: results)")
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds takes different numbers from 0 on")
    return args


def _require_device(device: str) -> None:
    """Ask torch, in a process of its own, whether it can use the GPU; ValueError if not."""
    if device == "cuda":
        code = "from experiments.engine.execute import require_device; require_device('cuda')"
        asked = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if asked.returncode:
            raise ValueError(asked.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def _choose(table: Table, labels: list[str] | None) -> list[Row]:
    if labels is None:
        return list(table.rows)
    known = {row.label: row for row in (*table.rows, *table.outside)}
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f"table {table.number} has no row {', '.join(map(repr, unknown))}; known: {', '.join(map(repr, known))}")
    return [known[label] for label in labels]


def _run(table: Table, rows: list[Row], protocol: Protocol, seeds: Sequence[int], device: str, store: Store, workers: int | None, named: bool) -> bool:
    """Count and time every row first, alone on the machine; then train and score, side by side."""
    cores = available_cores()
    counted = _missing(store, *{spec_id(cost): cost for row in rows for cost in cost_stages(row)}.values())  # one process: the first count is slow, the others are not
    measured = [Job("counts", counted)] if counted else []
    timed = {spec_id(stage := timing_stage(row, table.baseline, device)): Job(row.label, (stage,)) for row in timed_rows(table, rows, device, named)}
    measured += [job for job in timed.values() if _missing(store, *job.stages)]
    trained: dict[str, Job] = {}  # rows that are one network share one run
    for seed in seeds if not table.counts_only else ():
        for row in rows:
            stages = train_stage(row, protocol, seed), evaluate_stage(row, protocol, seed)
            if todo := _missing(store, *stages):
                trained.setdefault(spec_id(stages[1]), Job(f"{row.label}, seed {seed}", todo, chain=True))
    workers = workers or (1 if device == "cuda" else cores)
    jobs = list(trained.values())
    with Progress(total=sum(len(job.stages) for job in (*measured, *jobs))) as progress:
        good = run_here(measured, store.root, device, 1, cores, progress.notify)
        threads = cores if device == "cuda" else max(1, cores // workers)
        return run_here(jobs, store.root, device, workers, threads, progress.notify) and good


def _missing(store: Store, *stages: Stage) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if store.latest(stage) is None)


def _plan(table: Table, rows: list[Row], protocol: Protocol, seeds: Sequence[int], device: str, store: Store, named: bool) -> str:
    """One line a stage: what is done, what would run and for how long, by the reference's own times."""
    lines, seconds, unknown = [], 0.0, 0
    stages: list[tuple[str, Stage]] = [(row.label, cost) for row in rows for cost in cost_stages(row)]
    stages += [(row.label, timing_stage(row, table.baseline, device)) for row in timed_rows(table, rows, device, named)]
    for seed in seeds if not table.counts_only else ():
        for row in rows:
            stages += [(f"{row.label}, seed {seed}", stage) for stage in (train_stage(row, protocol, seed), evaluate_stage(row, protocol, seed))]
    seen: set[str] = set()
    for label, stage in stages:
        if (name := spec_id(stage)) in seen:
            continue
        seen.add(name)
        state, cost = "done", ""
        if store.latest(stage) is None:
            state = "failed before, would run again" if store.latest(stage, status="failed") else "would run"
            expected = _expected_seconds(stage, protocol, store)
            unknown += expected is None
            seconds += expected or 0
            cost = "" if expected is None else f"about {_duration(expected)}"
        lines.append(f"{name}  {kind_of(stage):8}  {label:34}  {state}  {cost}".rstrip())
    total = f"total: about {_duration(seconds)} of process time" + (f", and {unknown} stages of unknown length" if unknown else "")
    if not protocol.small:
        total += f" on {protocol.hardware}"
    return "\n".join([*lines, total])


def _expected_seconds(stage: Stage, protocol: Protocol, store: Store) -> float | None:
    for where in ("records", "reference"):
        if record := store.latest(stage, where):
            return record.provenance["seconds"]
    if isinstance(stage, Train):
        return None if protocol.cost_hours is None else protocol.cost_hours * 3600
    return None if isinstance(stage, Evaluate | Timing) else 1.0


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
