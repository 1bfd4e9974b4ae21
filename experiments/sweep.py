"""Sample one training in many ways, choose the best on some seeds, and report it on others.

    python experiments/sweep.py --sweep digits_guidance --dry-run
    python experiments/sweep.py --sweep digits_guidance --plot sweep.png

A sweep is a declared grid over guidance scale, guidance interval, sampler, number of steps and
length of the weight average. Every point is a record of its own for each selection seed, so that
running again goes on, and several processes share the points. The best point is then scored on
the protocol's report seeds, which did not choose it.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence
from dataclasses import replace

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.cli import (
    Outcome,
    Parser,
    add_format_option,
    add_run_options,
    carry_out,
    device_of,
    exit_status,
    open_store,
    resource_flags,
    run_command,
)
from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.plan import ListPlan
from experiments.engine.records.files import require_target
from experiments.engine.records.score_names import distance_score
from experiments.engine.records.store import Store
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sweeps.choice import (
    Point,
    choose,
    describe_point,
    read_points,
    sweep_sheet,
)
from experiments.engine.specs.spec import Evaluate
from experiments.engine.specs.sweeps import Sweep

# The protocol of the digits, with averages of every length. It is trained anew, under an id of its
# own, since the stored averages are part of a recipe.
DIGITS_AVERAGED = replace(
    DIGITS,
    name="digits_averaged",
    recipe=replace(DIGITS.recipe, power_snapshots=16),
)
SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "digits_guidance",
            TABLE_4.row("DiCo-S"),
            DIGITS,
            scales=(1.0, 1.5, 2.0, 3.0),
            samplers=("ddim", "ancestral"),
            steps=(10, 25, 50),
        ),
        Sweep(
            "digits_interval",
            TABLE_4.row("DiCo-S"),
            DIGITS,
            scales=(1.5, 2.5),
            intervals=((0, 1000), (0, 500), (200, 800)),
            samplers=("ddim",),
            steps=(25,),
        ),
        Sweep(
            "digits_average",
            TABLE_4.row("DiCo-S"),
            DIGITS_AVERAGED,
            samplers=("ddim",),
            steps=(25,),
            averages=(None, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20),
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep. The exit status is that of `run_command`."""
    return run_command(lambda: _run(_parse(arguments), arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--sweep", choices=list(SWEEPS), required=True, help="the declared grid")
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="points side by side (default: one per core)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw score against evaluations"
    )
    add_format_option(parser)
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers takes a number from 1 on")
    return args


def _run(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    # The whole grid is checked before anything runs.
    sweep = SWEEPS[args.sweep]
    stages = sweep.points(args.seed)
    _require_samplers(sweep, stages)
    if args.plot:
        require_target(args.plot, "--plot")

    # First the training, then all points, then the choice on the seeds that did not choose it.
    store = open_store(args.results)
    outcome = Outcome.DONE
    for phase in (_training_jobs, _selection_jobs, _report_jobs):
        jobs = [job.left(store) for job in phase(sweep, stages, args.seed, store)]
        jobs = [job for job in jobs if job.stages]
        if jobs or args.status or args.cancel or args.dry_run:
            outcome = _carry_out(jobs, args, store, arguments, sweep, stages[0])
        if outcome is not Outcome.DONE:
            break
    if outcome is not Outcome.ANSWERED:
        _print(sweep, stages, args, store)
    return exit_status(outcome)


def _carry_out(
    jobs: list[Job],
    args: argparse.Namespace,
    store: Store,
    arguments: Sequence[str] | None,
    sweep: Sweep,
    stage: Evaluate,
) -> Outcome:
    """Run the jobs of a phase, or answer what the options ask of them."""
    device = device_of(args, sweep.row.label)

    def require_sources() -> None:
        for training in stage.trainings:
            require_data(training.data)
        require_features(stage)

    # A dry run and a status tell of the whole sweep, whatever has run already.
    if args.dry_run or args.status or args.cancel:
        jobs = [
            *_training_jobs(sweep, sweep.points(args.seed), args.seed, store),
            *_selection_jobs(sweep, sweep.points(args.seed), args.seed, store),
        ]
    plan = ListPlan(device, together=tuple(jobs), resources=resource_flags(args, device))
    return carry_out(plan, args, store, arguments, require_sources, args.workers)


def _training_jobs(sweep: Sweep, stages: list[Evaluate], seed: int, store: Store) -> list[Job]:
    """Return one job for all trainings of the system."""
    label = f"{sweep.row.label}, seed {seed}"
    trainings = tuple(stages[0].trainings)
    return [Job(label, trainings, chain=True, row=sweep.row.label)]


def _selection_jobs(sweep: Sweep, stages: list[Evaluate], seed: int, store: Store) -> list[Job]:
    """Return a job for every point and selection seed."""
    return [
        _job(sweep, replace(stage, seed=sampling_seed))
        for stage in stages
        for sampling_seed in sweep.protocol.selection_seeds
    ]


def _report_jobs(sweep: Sweep, stages: list[Evaluate], seed: int, store: Store) -> list[Job]:
    """Return a job for every report seed of the best point, once it is known."""
    chosen = _choose(sweep, stages, store)[1]
    if chosen is None:
        return []
    seeds = sweep.protocol.report_seeds
    return [_job(sweep, replace(chosen.stage, seed=sampling_seed)) for sampling_seed in seeds]


def _job(sweep: Sweep, stage: Evaluate) -> Job:
    label = f"{describe_point(stage)}, sampling seed {stage.seed}"
    return Job(label, (stage,), row=sweep.row.label)


def _choose(sweep: Sweep, stages: list[Evaluate], store: Store) -> tuple[list[Point], Point | None]:
    """Return the points with their records, and the best one if all are scored."""
    seeds = sweep.protocol.selection_seeds
    points = read_points(stages, seeds, store)
    return points, choose(points, seeds, distance_score(stages[0].features))


def _print(sweep: Sweep, stages: list[Evaluate], args: argparse.Namespace, store: Store) -> None:
    """Print the table of a sweep, and draw its plot if one is asked for."""
    points, chosen = _choose(sweep, stages, store)
    title = f"Sweep {sweep.name}: {sweep.row.label}, {sweep.protocol.name}, seed {args.seed}"
    sheet = sweep_sheet(title, points, chosen, sweep.protocol.report_seeds, store)
    print(render([sheet], args.format))
    if args.plot:
        from experiments.engine.reporting.sweeps.plot import plot_sweep

        plot_sweep(title, points, chosen, args.plot)
        print(f"score against evaluations: {args.plot}")


def _require_samplers(sweep: Sweep, stages: list[Evaluate]) -> None:
    """Raise ValueError for a sampler that the training's diffusion lacks."""
    from experiments.engine.sampling.generate import require_sampler

    distinct: dict[tuple[str, int], Evaluate] = {}
    for stage in stages:
        distinct.setdefault((stage.sampler.name, stage.sampler.num_steps), stage)
    for stage in distinct.values():
        try:
            require_sampler(stage)
        except ValueError as error:
            raise ValueError(f"sweep {sweep.name}: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
