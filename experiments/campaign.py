"""Train what the page of evidence rests on, block by block, at the lowest priority.

    python experiments/campaign.py --dry-run     what is left, in core-hours
    python experiments/campaign.py               go on from the records of this machine and the
                                                 committed ones
    python experiments/campaign.py --export-weights FOLDER
                                                 write the averaged weights of the trainings that
                                                 finished here, with a manifest of their hashes

A block first searches a learning rate for every network on the validation part, writes it to
results/rates.csv, and then trains the rows at full and at half length. Finished records are copied
to results/reference, where they can be committed. An interrupt stops after saving; the same command
goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import hashlib
import json
import os
from collections.abc import Sequence

from experiments.declared import rates
from experiments.declared.campaign import BLOCKS, Block, finished, ladders_of
from experiments.engine.cli import Parser, add_results_option, open_store, run_command
from experiments.engine.cluster.launch import Cluster, require_sources, run_plan
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.plan import ListPlan
from experiments.engine.jobs.pool import available_cores
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import Store, read_record
from experiments.engine.specs.rows import read_table_name
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import HeldOut, Stage, Train, spec_id

NICENESS = 19
# Kinds of records that the page reads.
KINDS = ("cost", "train", "evaluate", "heldout")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign. The exit status is that of `run_command`."""
    return run_command(lambda: _run(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what is left, run nothing")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="trainings side by side (default: one per core)",
    )
    parser.add_argument(
        "--export-weights",
        type=Path,
        metavar="FOLDER",
        help="write averaged weights there, run nothing",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        default=len(BLOCKS),
        help="work on the first N blocks alone (default: all)",
    )
    parser.add_argument(
        "--table",
        type=read_table_name,
        metavar="NAME",
        choices=list(dict.fromkeys(block.table.number for block in BLOCKS)),
        help="of these, work on the blocks of this table alone (default: of all tables)",
    )
    add_results_option(parser)
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    if not 1 <= args.blocks <= len(BLOCKS):
        parser.error(f"--blocks takes a number from 1 to {len(BLOCKS)}")
    return args


def _run(args: argparse.Namespace) -> int:
    store = open_store(args.results)
    blocks = [block for block in BLOCKS[: args.blocks] if args.table in (None, block.table.number)]
    if args.dry_run:
        print(describe(blocks, store))
        return 0
    if args.export_weights:
        print(export_weights(blocks, store, args.export_weights))
        return 0

    os.nice(NICENESS - os.nice(0))
    store.check_writable()
    for block in blocks:
        selection = Selection(block.table, block.table.rows, block.protocol, block.seeds, "cpu")
        require_sources(selection)

    # A training that fails is recorded, and the others go on.
    export(store)
    all_done = True
    for block in blocks:
        all_done &= _search_rates(block.at_chosen_rates(), store, args.workers)
        all_done &= _train_rows(block.at_chosen_rates(), store, args.workers)
    return 0 if all_done else 1


def _search_rates(block: Block, store: Store, workers: int | None) -> bool:
    """Run the ladders of a block until each has its best rate inside, and write the rates."""
    all_done = True
    while jobs := open_ladders(block, store):
        print(f"{block.title}: {len(jobs)} trainings for the learning rates", flush=True)
        all_done &= run_plan(ListPlan("cpu", together=tuple(jobs)), store, Cluster.HERE, workers)
        store.refresh()
        export(store)

    # The file holds the rates of other blocks too.
    chosen = dict(rates.read_rates(rates.PATH))
    for ladder in ladders_of(block):
        key = (block.protocol.name, ladder.network)
        chosen[key] = (ladder.row.label, ladder.best(store))
    if chosen != dict(rates.read_rates(rates.PATH)):
        rates.write_rates(rates.PATH, chosen)
    return all_done


def _train_rows(block: Block, store: Store, workers: int | None) -> bool:
    """Run the rows of a block, and export their records a few runs at a time."""
    all_done = True
    jobs = open_runs(block, store)
    at_once = 2 * (workers or available_cores())
    for start in range(0, len(jobs), at_once):
        print(f"{block.title}: {len(jobs) - start} runs left", flush=True)
        part = tuple(jobs[start : start + at_once])
        plan = ListPlan("cpu", costs=tuple(block.costs(store)), together=part)
        all_done &= run_plan(plan, store, Cluster.HERE, workers)
        store.refresh()
        export(store)
    return all_done


def open_ladders(block: Block, store: Store) -> list[Job]:
    """Return the trainings that a block's ladders still need."""
    return [job for ladder in ladders_of(block) for job in ladder.jobs(store)]


def open_runs(block: Block, store: Store) -> list[Job]:
    """Return the runs of a block whose scores have no record, here or committed."""
    return [
        job
        for job in block.jobs()
        if any(finished(stage, store) is None for stage in job.stages if _is_score(stage))
    ]


def _is_score(stage: Stage) -> bool:
    return not isinstance(stage, Train)


def describe(blocks: Sequence[Block], store: Store) -> str:
    """Return a line per block: what is left, in trainings and core-hours.

    What several blocks need counts in the first of them.
    """
    lines, total = [], 0.0
    counted: set[str] = set()
    for block in blocks:
        ladders = _uncounted(open_ladders(block, store), counted)
        runs = _uncounted(open_runs(block, store), counted)
        hours = sum(_hours(job, block) for job in [*ladders, *runs])
        total += hours
        lines.append(
            f"{block.title}: {len(ladders)} trainings for learning rates and {len(runs)} runs "
            f"left, about {hours:.1f} core-hours"
        )
    return "\n".join([*lines, f"total: about {total:.1f} core-hours"])


def _uncounted(jobs: Sequence[Job], counted: set[str]) -> list[Job]:
    """Return the jobs that are not counted yet, and count them."""
    names = [spec_id(job.stages[-1]) for job in jobs]
    new = [job for job, name in zip(jobs, names, strict=True) if name not in counted]
    counted.update(names)
    return new


def _hours(job: Job, block: Block) -> float:
    """Return what a job is expected to take on one core, by its share of a full training."""
    full = block.protocol.recipe.steps
    steps = sum(stage.train.recipe.steps for stage in job.stages if isinstance(stage, HeldOut))
    return (block.protocol.cost_hours or 0.0) * steps / full


def export(store: Store) -> None:
    """Copy the campaign's records to the committed ones, failed trainings too."""
    records = {path.name: path for path in store.here.paths() if path.parent.name in KINDS}
    for name, path in records.items():
        target = store.reference.folder / path.parent.name / name
        record = read_record(path)
        is_result = record.status == "done" or record.kind == "train"
        if is_result and not target.exists():
            with written_whole(target) as file:
                file.write(path.read_bytes())


def export_weights(blocks: Sequence[Block], store: Store, folder: Path) -> str:
    """Write the averaged weights of the campaign's trainings that finished on this machine.

    The manifest names row, protocol, seed, training and SHA-256 of each file. Returns what was
    written, in words.
    """
    import torch
    from safetensors.torch import save

    from experiments.engine.training.networks import load_ema

    manifest = {}
    for block in blocks:
        for job in block.jobs():
            # The first ones are what the row's own training starts from.
            train = [stage for stage in job.stages if isinstance(stage, Train)][-1]
            if store.here.latest(train) is None:
                continue
            network = load_ema(train, store.run_dir(train), torch.device("cpu"))
            weights = {name: value.contiguous() for name, value in network.state_dict().items()}
            content = save(weights)
            name = f"{spec_id(train)}.safetensors"
            with written_whole(folder / name) as file:
                file.write(content)
            manifest[name] = {
                "row": job.row,
                "table": block.table.number,
                "protocol": block.protocol.name,
                "steps": train.recipe.steps,
                "seed": train.seed,
                "train": spec_id(train),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    with written_whole(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    return f"{folder}: {len(manifest)} networks and manifest.json"


if __name__ == "__main__":
    raise SystemExit(main())
