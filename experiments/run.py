"""One declared run in this process, or in all processes of this allocation: what the scripts under slurm/ call.

    srun python experiments/run.py --table 8 --row DiCo-XL --protocol imagenet256_own

Same id, folder and record as `--cluster slurm` and `--cluster here` give. Resources of the trainer come from slurm/site.toml.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from experiments import ablation, main_results
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, guarded
from experiments.engine.cluster.client import remember_this_job
from experiments.engine.cluster.site import load_site, warn_of_unknown_rows
from experiments.engine.cluster.submit import given
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.plan import Chosen
from experiments.engine.jobs.pool import work_in_job
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import evaluate_stage

TABLES = ablation.TABLES | main_results.TABLES


def main() -> int:
    return guarded(_main)


def _main() -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad input, 75 stopped before the end and able to go on, 137 lost a process."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", type=int, choices=list(TABLES), required=True, help="table that declares the row"
    )
    parser.add_argument("--row", required=True, help="its label")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="digits")
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: the site's, which is GPUs unless gpus_per_node is 0",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=os.environ.get("RESULTS") or None,
        metavar="DIR",
        help="results folder (default: $RESULTS, else results)",
    )
    args = parser.parse_args()
    table, protocol = TABLES[args.table], PROTOCOLS[args.protocol]
    row = table.row(args.row)
    stage, root = evaluate_stage(row, protocol, args.seed), Store(args.results).root.resolve()
    (job,) = Chosen(table, [row], protocol, [args.seed], "").trainings()  # the same on any device
    with suppress(OSError):  # a folder that cannot be written is for the run to report
        remember_this_job(root, job.label, map(spec_id, job.stages))
    for training in stage.trainings:
        require_data(training.data)
    require_features(stage)
    site = load_site(row.label)
    warn_of_unknown_rows(
        row.label for table in TABLES.values() for row in (*table.rows, *table.outside)
    )
    error = work_in_job(job, root, **given(site) | {"device": args.device or site.device})
    if error:
        print(f"error: {error}", file=sys.stderr)
    return 1 if error else 0


if __name__ == "__main__":
    raise SystemExit(main())
