"""Run a plan on this machine: counts first, then timings one by one, then trainings side by side.

This module does not import torch: every job runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from experiments.engine.data.locate import require_data, require_features
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.plan import Plan, missing
from experiments.engine.jobs.pool import available_cores, run_here
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.records.store import Store
from experiments.engine.records.tree import warn_without_commit
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Data
from experiments.engine.specs.stages import evaluate_stage


class Cluster(StrEnum):
    """Where jobs run, as --cluster names it."""

    HERE = "here"  # worker processes of this command
    DEBUG = "debug"  # this process, one job after another, so that a breakpoint() can stop
    LOCAL = "local"  # processes that submitit starts on this machine
    SLURM = "slurm"  # jobs of a Slurm cluster


def run_plan(plan: Plan, store: Store, cluster: Cluster, workers: int | None = None) -> bool:
    """Run what lacks a record. Return True if every stage is done.

    Args:
        cluster: any but SLURM, whose jobs are submitted by `status.send`.
        workers: trainings that run side by side; by default one per core, or one on a GPU.
    """
    cores = available_cores()
    on_gpu = plan.device == "cuda"
    workers = workers or (1 if on_gpu else cores)

    counts = missing(plan.counts(), store)
    timings = missing(plan.timings(), store)
    trainings = missing(plan.trainings(), store)
    num_stages = sum(len(job.stages) for job in (*counts, *timings, *trainings))
    if num_stages:
        warn_without_commit()

    with ProgressDisplay(total=num_stages) as progress:

        def run(jobs: Sequence[Job], side_by_side: int, threads: int, **resources: object) -> bool:
            return run_here(
                jobs, store.root, plan.device, side_by_side, threads, progress.notify, **resources
            )

        def run_through_submitit(
            jobs: Sequence[Job], side_by_side: int, **resources: object
        ) -> bool:
            from experiments.engine.cluster.local import run_locally

            debug = cluster is Cluster.DEBUG
            return run_locally(
                jobs, store.root, plan.device, side_by_side, debug, progress.notify, **resources
            )

        # Counting takes little time, and every plan line and Gflops column needs it.
        all_counted = run(counts, 1, cores)

        # A network that is timed has the machine to itself.
        if cluster is Cluster.HERE:
            threads = cores if on_gpu else max(1, cores // workers)
            all_timed = run(timings, 1, cores)
            all_trained = run(trainings, workers, threads, **plan.resources)
        else:
            all_timed = run_through_submitit(timings, 1)
            all_trained = run_through_submitit(trainings, workers, **plan.resources)
    return all_counted and all_timed and all_trained


def require_sources(selection: Selection) -> None:
    """Raise ValueError if data or score features of the selection are missing here."""
    if selection.table.counts_only:
        return
    sets: dict[str, Data] = {}
    for row in selection.networks:
        for training in evaluate_stage(row, selection.protocol, 0).trainings:
            sets[training.data.name] = training.data
    for data in sets.values():
        require_data(data)
    require_features(evaluate_stage(selection.table.baseline, selection.protocol, 0))
