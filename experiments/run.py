"""Run one declared row in this process, or in all processes of this allocation.

    srun python experiments/run.py --table 8 --row DiCo-XL --protocol imagenet256_own

The scripts under slurm/ call this command. Id, folder and record are those that `--cluster slurm`
and `--cluster here` give. slurm/site.toml sets the resources of the trainer.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from contextlib import suppress

from experiments import ablation, main_results
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import (
    Parser,
    add_device_option,
    add_protocol_option,
    add_results_option,
    labels_of,
    run_command,
)
from experiments.engine.cluster.client import remember_this_job
from experiments.engine.cluster.site import load_site, warn_of_unknown_rows
from experiments.engine.cluster.submit import stage_ids, trainer_resources
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.jobs.scheduled import work_in_job
from experiments.engine.records.store import Store
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import evaluate_stage

TABLES = ablation.TABLES | main_results.TABLES


def main() -> int:
    """Run the row.

    Returns:
        The exit status: 0 done, 1 a stage failed, 2 bad input, 75 stopped before the end and ready
        to continue, 137 a process of the job died.
    """
    return run_command(lambda: _run_row(_parse()))


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--table", type=int, choices=list(TABLES), required=True, help="table that declares the row"
    )
    parser.add_argument("--row", required=True, help="label of the row")
    add_protocol_option(parser, PROTOCOLS)
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    add_device_option(parser, "that of the site file: GPUs, unless gpus_per_node is 0")
    add_results_option(parser)
    return parser.parse_args()


def _run_row(args: argparse.Namespace) -> int:
    table, protocol = TABLES[args.table], PROTOCOLS[args.protocol]
    row = table.row(args.row)
    root = Store(args.results).root.resolve()
    # Trainings are the same on any device.
    selection = Selection(table, [row], protocol, [args.seed], device="")
    (job,) = TablePlan(selection).trainings()

    # Let --status find this job. A folder that cannot be written is reported by the run itself.
    with suppress(OSError):
        remember_this_job(root, job.label, stage_ids([job]))

    # Fail before any work if something is missing.
    stage = evaluate_stage(row, protocol, args.seed)
    for training in stage.trainings:
        require_data(training.data)
    require_features(stage)

    site = load_site(row.label)
    warn_of_unknown_rows(labels_of(TABLES.values()))
    resources = trainer_resources(site) | {"device": args.device or site.device}
    error = work_in_job(job, root, **resources)
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
