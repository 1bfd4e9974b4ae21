"""Run a study, a file of one's own, or one declared row in all processes of this allocation.

    python experiments/run.py my_study.py
    srun python experiments/run.py --table 8 --row DiCo-XL --protocol imagenet256_own
    torchrun --nproc-per-node=8 -- experiments/run.py my_study.py --row Mine --seed 1

A study declares rows, data, protocols and networks; experiments/STUDY.md explains how. Its code
runs with the rights of whoever names the file. Without --row, `run.py my_study.py --help` lists the
options, which are those of `ablation.py`.

The scripts under slurm/ call this command with --row. Id, folder and record are those that
`--cluster slurm` and `--cluster here` give. slurm/site.toml sets the resources of the trainer.
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
from experiments.engine.choices import (
    Choices,
    add_study_argument,
    add_table_option,
    choices_of,
    labels_of,
)
from experiments.engine.cli import (
    Parser,
    add_device_option,
    add_protocol_option,
    add_results_option,
    run_command,
    run_table,
)
from experiments.engine.cluster.client import remember_this_job
from experiments.engine.cluster.site import load_site, warn_of_unknown_rows
from experiments.engine.cluster.submit import stage_ids, trainer_resources
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.jobs.scheduled import work_in_job
from experiments.engine.records.code import keep_study
from experiments.engine.records.store import Store
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import evaluate_stage

TABLES = ablation.TABLES | main_results.TABLES
STUDY_HELP = """Run, plan or print a table of a study, as ablation.py does with the paper's.

With --row, the command runs that one row in this process, or in all processes of this allocation;
--row X --help lists the options of that form.
"""


def main() -> int:
    """Run the study or the row.

    Returns:
        The exit status: 0 done, 1 a stage failed, 2 bad input, 75 stopped before the end and ready
        to continue, 137 a process of the job died.
    """
    return run_command(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    # A study comes first, because options with several values would take its name.
    names_study = bool(arguments) and not arguments[0].startswith("-")
    choices = choices_of(Path(arguments[0])) if names_study else Choices(TABLES, PROTOCOLS)
    names_row = any(word.partition("=")[0] == "--row" for word in arguments)
    if names_study and not names_row:
        return run_table(choices, STUDY_HELP, arguments)
    return _run_row(_parse(choices, arguments), choices)


def _parse(choices: Choices, arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    if choices.of_study:
        add_study_argument(parser)
    add_table_option(parser, choices)
    parser.add_argument("--row", required=True, help="label of the row")
    add_protocol_option(parser, choices.protocols, choices.protocol)
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    add_device_option(parser, "that of the site file: GPUs, unless gpus_per_node is 0")
    add_results_option(parser)
    return parser.parse_args(arguments)


def _run_row(args: argparse.Namespace, choices: Choices) -> int:
    table, protocol = choices.tables[args.table], choices.protocols[args.protocol]
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
    warn_of_unknown_rows(labels_of(choices.tables.values()))
    keep_study(root)
    resources = trainer_resources(site) | {"device": args.device or site.device}
    error = work_in_job(job, root, **resources)
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
