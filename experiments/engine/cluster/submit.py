"""Submit jobs to Slurm through submitit, as arrays of jobs with the same resources.

A run saves and requeues itself when Slurm tells it to stop. submitit only starts it: its own
checkpoints and time limits stay out of the way.
"""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.engine.cluster.client import (
    Submission,
    client,
    one_line,
    remember,
    waiting_or_running,
)
from experiments.engine.cluster.nested import outside_of_jobs
from experiments.engine.cluster.site import Site
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.scheduled import work_in_job
from experiments.engine.records.code import Code, own_code, require_code
from experiments.engine.records.files import locked
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import spec_id

# What sbatch says of resources that exist but are drained or reserved today.
NOT_NOW = "Requested node configuration is not available"

# submitit counts time-outs and gives up. The trainer bounds restarts by progress instead.
UNBOUNDED_TIMEOUTS = 10**6

PYTHON = '"$PYTHON"'  # slurm/job.sh sets it


@dataclass(frozen=True)
class Array:
    """Jobs that take the same resources. Slurm runs them as one array."""

    site: Site
    jobs: tuple[Job, ...]


def run_job(job: Job, root: Path, resources: dict[str, Any], code: Code) -> None:
    """Run a job in each of its processes. Raise RuntimeError if a stage failed.

    The error makes the job itself fail, so that the queue shows it.

    Args:
        root: the results folder, where the command has kept its study.
        code: that of the command that submitted the job.
    """
    require_code(code, root)
    error = work_in_job(job, root, **resources)
    if error:
        raise RuntimeError(error)


def new_folder(root: Path) -> Path:
    """Return the path of a new folder for one submission.

    Schedulers use job ids again, and submitit would take an old job's files for those of a new one.

    Raises:
        ValueError: if submitit or Slurm would take the path for another.
    """
    require_plain_path(root)
    day = time.strftime("%Y%m%d", time.gmtime())
    return root.resolve() / "submissions" / f"dico-{day}-{uuid.uuid4().hex[:8]}"


def require_plain_path(root: Path) -> None:
    """Raise ValueError if submitit or Slurm could not name files in a results folder.

    Both replace patterns such as %j in the names of logs. Slurm reads backslashes as escapes and
    the script line by line, and submitit writes the script as UTF-8.
    """
    path = str(root.resolve())
    unfit = {"%": "%", "\\": "a backslash", "\n": "a line break", "\r": "a line break"}
    problems = {words for character, words in unfit.items() if character in path}
    if not path.isprintable() and not problems:
        problems = {"a character that cannot be printed"}
    if problems:
        raise ValueError(
            f"jobs cannot be submitted from the results folder {ascii(path)}, whose path holds "
            f"{' and '.join(sorted(problems))}; choose another folder with --results"
        )


def trainer_resources(site: Site) -> dict[str, Any]:
    """Return what a site gives to the trainer, by the names of `trainer.Resources`."""
    return {
        "device": site.device,
        "checkpoint_every": site.checkpoint_every,
        "keep": site.keep,
        "milestones": site.milestones or None,
        "micro_batch": site.micro_batch or None,
        "sample_batch": site.sample_batch,
        "timeout": float(site.collective_seconds),
        "shard_optimizer": site.shard_optimizer,
        "fully_shard": site.fully_shard,
        "recompute": site.recompute,
        "compile": site.compile,
        "graphs": site.graphs,
    }


def submitit_parameters(site: Site, folder: Path) -> dict[str, Any]:
    """Return what a site gives to sbatch, by submitit's names."""
    # Empty strings leave the choice to the cluster.
    named = {name: getattr(site, name) for name in ("partition", "account", "qos", "constraint")}
    named["mem"] = site.mem
    parameters: dict[str, Any] = {name: value for name, value in named.items() if value}

    if site.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        parameters["gpus_per_node"] = f"{kind}{site.gpus_per_node}" if kind else site.gpus_per_node

    # The batch script goes to the repository, and job.sh takes care of restarts.
    setup = [
        f"cd {shlex.quote(str(REPOSITORY))}",
        f"SUBMITTED_FROM={shlex.quote(str(folder.parents[1]))}",
        f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        "source slurm/job.sh || exit 2",
        # The job imports this tree, whatever folder or PYTHONPATH it was submitted from.
        f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]
    return parameters | {
        "job_name": folder.name,
        "nodes": site.nodes,
        "ntasks_per_node": site.tasks,
        "cpus_per_task": site.cpus_per_task,
        "time": site.seconds // 60,
        "signal_delay_s": site.signal_seconds,
        "array_parallelism": site.concurrent,
        "stderr_to_stdout": True,
        "srun_args": [f"--cpus-per-task={site.cpus_per_task}", "--kill-on-bad-exit=1"],
        "setup": setup,
        "wckey": None,
        "additional_parameters": {"requeue": True} | site.options,
    }


def batch_script_text(site: Site, folder: Path, num_jobs: int) -> str:
    """Return the batch script that submitit writes for an array of `num_jobs`.

    submitit has no public function for this text, which --dry-run prints and `sbatch --test-only`
    judges. This is the only use of a private one; tests/engine/cluster/test_submit.py compares its
    text with the script that a submission writes.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    map_count = num_jobs if num_jobs > 1 else None
    return _make_sbatch_string(
        command, folder, map_count=map_count, **submitit_parameters(site, folder)
    )


def submit(
    arrays: Sequence[Array], store: Store, experiment: str, **resources: Any
) -> list[Submission]:
    """Submit arrays to Slurm without the jobs that are in the queue, and return at once.

    Args:
        experiment: the command that submits, which alone may cancel these jobs.
        resources: resources of the trainer that override those of the sites.

    Raises:
        ValueError: with the scheduler's message. Where it refuses a script that it was asked to
            judge, nothing was submitted.
    """
    folder = store.root / "submissions"
    folder.mkdir(parents=True, exist_ok=True)
    submissions: list[Submission] = []

    # A second command waits here, and then sees the jobs of the first in the queue.
    with locked(folder / "lock"), outside_of_jobs():
        waiting = _without_queued(arrays, store)
        folders = [new_folder(store.root) for _ in waiting]
        for array, new in zip(waiting, folders, strict=True):
            _require_acceptance(batch_script_text(array.site, new, len(array.jobs)), store.root)

        for array, new in zip(waiting, folders, strict=True):
            try:
                sent = _submit_array(array, new, store, experiment, resources)
            except ValueError as error:
                raise ValueError(f"{error}{_sent_before(submissions)}") from None
            remember(store.root, sent)
            submissions += sent
    return submissions


def _without_queued(arrays: Sequence[Array], store: Store) -> list[Array]:
    """Return the arrays without jobs of which a stage is in the queue, and without empty arrays."""
    jobs = [job for array in arrays for job in array.jobs]
    in_queue = waiting_or_running(store.root, stage_ids(jobs))
    queued = {stage for submission in in_queue for stage in submission.stages}

    waiting = []
    for array in arrays:
        kept = tuple(job for job in array.jobs if not queued & set(stage_ids([job])))
        if kept:
            waiting.append(Array(array.site, kept))
    return waiting


def stage_ids(jobs: Sequence[Job]) -> list[str]:
    """Return the ids of all stages of some jobs."""
    return [spec_id(stage) for job in jobs for stage in job.stages]


def _submit_array(
    array: Array, folder: Path, store: Store, experiment: str, resources: dict[str, Any]
) -> list[Submission]:
    """Submit one array. Raise ValueError with the scheduler's message if it refuses."""
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=UNBOUNDED_TIMEOUTS, python=PYTHON)
    executor.update_parameters(**submitit_parameters(array.site, folder))
    root, num_jobs = store.root.resolve(), len(array.jobs)
    all_resources = trainer_resources(array.site) | resources
    try:
        handles = executor.map_array(
            run_job,
            array.jobs,
            [root] * num_jobs,
            [all_resources] * num_jobs,
            [own_code()] * num_jobs,
        )
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch: {one_line(str(error))}") from None

    return [
        Submission(
            stages=tuple(stage_ids([job])),
            label=job.label,
            job=handle.job_id,
            name=folder.name,
            log=str(handle.paths.stdout.relative_to(root)),
            experiment=experiment,
        )
        for job, handle in zip(array.jobs, handles, strict=True)
    ]


def _sent_before(submissions: Sequence[Submission]) -> str:
    """Return what an error adds when earlier arrays were submitted already."""
    if not submissions:
        return ""
    return "; submitted before it: " + ", ".join(f"job {sent.job}" for sent in submissions)


def _require_acceptance(script: str, root: Path) -> None:
    """Let the scheduler judge a batch script without queueing it. Raise ValueError if it refuses.

    A script that Slurm refuses only today, while nodes are drained or reserved, is a warning: Slurm
    queues it all the same.
    """
    path = root / "submissions" / f".{uuid.uuid4().hex}.sh"
    path.write_text(script, encoding="utf-8")

    # A passing refusal is only a warning, and any other one ends the submission.
    try:
        client("sbatch", "--test-only", str(path))
    except ValueError as refusal:
        if NOT_NOW not in str(refusal):
            raise
        print(
            f"warning: {refusal}; submitted all the same, since nodes may be drained or reserved. "
            "--status shows the reason",
            file=sys.stderr,
        )
    finally:
        path.unlink()
