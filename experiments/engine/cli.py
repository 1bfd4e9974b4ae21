"""The command line that every experiment script shares. It chooses among declarations; no hyper-parameter has a flag.

No torch here: `--help`, `--dry-run` and `--report` answer at once, and runs happen in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from experiments.engine.cluster import status as slurm
from experiments.engine.cluster.site import load_site, warn_of_unknown_rows
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.plan import Chosen, Plan, describe, missing
from experiments.engine.jobs.pool import available_cores, run_here, unwind
from experiments.engine.jobs.progress import Progress
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import Protocol, cost_stages, evaluate_stage

CLUSTERS = ("here", "debug", "local", "slurm")


def main(
    tables: dict[int, Table],
    protocols: dict[str, Protocol],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run, plan or print a table; the exit status is `guarded`'s."""
    return guarded(lambda: _main(tables, protocols, description, arguments))


def _cannot_write(error: OSError) -> str:
    return f"cannot write results ({error.strerror}); free space or choose another folder with --results"


def guarded(run: Callable[[], int], words: Callable[[OSError], str] = _cannot_write) -> int:
    """A command whose bad input is one line. Exit status: 0 done, 1 some stage failed, 2 bad input, 130 interrupted, 143 terminated."""
    before = signal.signal(signal.SIGTERM, unwind)  # its workers would outlive it otherwise
    try:
        return run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the table has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(
    tables: dict[int, Table],
    protocols: dict[str, Protocol],
    description: str | None,
    arguments: Sequence[str] | None,
) -> int:
    args = _parse(tables, protocols, description, arguments)
    table, protocol, store = (
        tables[args.table],
        protocols[args.protocol],
        Store(args.results, REPOSITORY / "results" / "reference"),
    )
    rows = _choose(table, args.rows)
    if protocol.own and (side := cost_stages(table.baseline)[0].size) != protocol.data.size:
        raise ValueError(
            f"the recipes of table {table.number} are for latents of side {side}, protocol {protocol.name} has {protocol.data.size}; take imagenet{8 * side}_own"
        )
    device, *others = dict.fromkeys(device_of(args, row.label) for row in rows)
    if others:
        raise ValueError(
            "the site computes some of these rows on GPUs and others on CPUs; name those of one kind with --rows"
        )
    chosen = Chosen(
        table,
        rows,
        protocol,
        args.seeds,
        device,
        named=args.rows is not None,
        resources=fast(args, device),
    )
    if args.cluster == "slurm":
        warn_of_unknown_rows(
            row.label for each in tables.values() for row in (*each.rows, *each.outside)
        )

    def require_sources() -> None:
        for data in {
            stage.data.name: stage.data
            for row in chosen.networks
            for stage in evaluate_stage(row, protocol, 0).trainings
        }.values():
            require_data(data)
        require_features(evaluate_stage(table.baseline, protocol, 0))

    good = carry_out(
        chosen,
        args,
        store,
        arguments,
        (lambda: None) if table.counts_only else require_sources,
        args.workers,
    )
    if good is None:
        return 0
    selection = Selection(table, rows, protocol, args.seeds, chosen.device, chosen.named)
    sheets = report_sheets(selection, store)
    print(render(sheets, args.format))
    return 0 if good else 1


def device_of(args: argparse.Namespace, row: str) -> str:
    """What --device says; else what this machine has, or on Slurm what the site gives to the row: this machine's devices say nothing of it."""
    if args.cluster != "slurm":
        return args.device or ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    device = load_site(row).device
    if args.device not in (None, device):
        raise ValueError(
            f"--device {args.device} contradicts the site, whose nodes compute on {device}; leave it out, or change gpus_per_node in slurm/site.toml"
        )
    return device


def carry_out(
    plan: Plan,
    args: argparse.Namespace,
    store: Store,
    arguments: Sequence[str] | None,
    require_sources: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> bool | None:
    """Do with a plan what the options of `add_run_options` ask for: None if all is said with that, else whether every job is done.

    `require_sources` raises ValueError where something is missing that the jobs read; `workers` jobs train side by side here.
    """
    on_slurm = args.cluster == "slurm"
    if args.dry_run:
        print(describe(plan, store))
        if on_slurm:
            print(slurm.describe(plan, store))
        return None
    if args.status:
        print(slurm.status(plan, store))
        return None
    if args.cancel:
        print(slurm.cancel(plan, store))
        return None
    if args.report:
        return True
    require_sources()
    if on_slurm:
        print(
            slurm.send(
                plan,
                store,
                shlex.join(
                    [
                        "python",
                        os.path.relpath(sys.argv[0]),
                        *(sys.argv[1:] if arguments is None else arguments),
                    ]
                ),
            )
        )
        return None
    require_device(plan.device)
    store.check_writable()
    good = _run(plan, store, args.cluster, workers)
    store.refresh()
    return good


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parse(
    tables: dict[int, Table],
    protocols: dict[str, Protocol],
    description: str | None,
    arguments: Sequence[str] | None,
) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = ", ".join(f"{number} ({table.title})" for number, table in tables.items())
    parser.add_argument(
        "--table",
        type=int,
        choices=list(tables),
        required=True,
        help=f"table of the paper: {numbers}",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these rows, by label; also reaches the '(alt)' rows",
    )
    parser.add_argument(
        "--protocol",
        choices=list(protocols),
        default="digits",
        help="data, recipe, sampler and scores (default: digits)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="training seeds (default: 0)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="trainings side by side (default: one a core, on a GPU one)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the printed table")
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds takes different numbers from 0 on")
    return args


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command that runs stages has: where, on what, into which folder, and whether at all."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run, what is done and what it will cost",
    )
    parser.add_argument(
        "--report", action="store_true", help="print from records without running anything"
    )
    parser.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default="here",
        help="where to run: here, through submitit here (local: a process a job; debug: all in this process, one by one, where a breakpoint() of yours can stop; nothing else opens a debugger) or on Slurm",
    )
    parser.add_argument(
        "--status",
        action="store_true",
        help="print every run's state: waiting, running, done or failed",
    )
    parser.add_argument(
        "--cancel", action="store_true", help="cancel what this command submitted, and nothing else"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: the GPU if there is one; on Slurm the site's",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=os.environ.get("RESULTS") or None,
        metavar="DIR",
        help="results folder (default: $RESULTS, else results)",
    )
    add_fast_options(parser)


def add_fast_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="networks by torch.compile")
    parser.add_argument("--graphs", action="store_true", help="steps by CUDA graphs, on a GPU")


def fast(args: argparse.Namespace, device: str) -> dict[str, bool]:
    """Those of --compile and --graphs that are asked for, as resources of the trainer name them; on Slurm they come on top of the site's."""
    if args.graphs and device != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, and this is for {device}; leave out --graphs")
    return {name: True for name in ("compile", "graphs") if getattr(args, name)}


def require_device(device: str) -> None:
    """Ask torch, in a process of its own, whether it can use the GPU; ValueError if not."""
    if device == "cuda":
        code = "from experiments.engine.jobs.execute import require_device; require_device('cuda')"
        asked = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode:
            raise ValueError(asked.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def _choose(table: Table, labels: list[str] | None) -> list[Row]:
    if labels is None:
        return list(table.rows)
    return [table.row(label) for label in labels]


def _run(plan: Plan, store: Store, cluster: str, workers: int | None) -> bool:
    """Count first; then time, each network alone on the machine; then train and score, side by side."""
    cores = available_cores()
    counts, timings, trainings = (
        missing(jobs, store) for jobs in (plan.counts(), plan.timings(), plan.trainings())
    )
    workers = workers or (1 if plan.device == "cuda" else cores)
    with Progress(
        total=sum(len(job.stages) for job in (*counts, *timings, *trainings))
    ) as progress:
        good = run_here(counts, store.root, plan.device, 1, cores, progress.notify)
        if cluster != "here":
            from experiments.engine.cluster.submit import run_locally

            good = (
                run_locally(
                    timings, store.root, plan.device, 1, cluster == "debug", progress.notify
                )
                and good
            )
            return (
                run_locally(
                    trainings,
                    store.root,
                    plan.device,
                    workers,
                    cluster == "debug",
                    progress.notify,
                    **plan.resources,
                )
                and good
            )
        good = run_here(timings, store.root, plan.device, 1, cores, progress.notify) and good
        threads = cores if plan.device == "cuda" else max(1, cores // workers)
        return (
            run_here(
                trainings,
                store.root,
                plan.device,
                workers,
                threads,
                progress.notify,
                **plan.resources,
            )
            and good
        )
