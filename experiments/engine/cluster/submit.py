"""Jobs through submitit: arrays on a Slurm cluster, processes of their own here ('local'), or this process ('debug').

A run saves and requeues itself when it is told to; submitit only starts it, and its own checkpoints and limits stay out of the way.
"""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.engine.cluster.client import (
    Submission,
    client,
    remember,
    waiting_or_running,
    words,
)
from experiments.engine.cluster.site import Site
from experiments.engine.jobs.pool import Job, available_cores, work_in_job
from experiments.engine.records.files import locked
from experiments.engine.records.store import REPOSITORY, Store, timestamp
from experiments.engine.specs.spec import spec_id

NOT_NOW = "Requested node configuration is not available"
UNBOUNDED = 10**6  # submitit's count of time-outs; the trainer bounds restarts by progress


def task(job: Job, root: Path, resources: dict[str, Any]) -> None:
    """What every process of a submitted job runs; a failed stage is a failed job, so that the queue shows it."""
    if error := work_in_job(job, root, **resources):
        raise RuntimeError(error)


def new_folder(root: Path) -> Path:
    """A folder of its own for every submission: job ids can come again, and submitit would take an old job's files for new ones."""
    return (
        root.resolve()
        / "submissions"
        / f"dico-{time.strftime('%Y%m%d', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    )


def given(site: Site) -> dict[str, Any]:
    """What a site gives to the trainer."""
    same = {
        name: getattr(site, name)
        for name in (
            "device",
            "checkpoint_every",
            "keep",
            "sample_batch",
            "shard_optimizer",
            "compile",
            "graphs",
        )
    }
    return same | {
        "milestones": site.milestones or None,
        "micro_batch": site.micro_batch or None,
        "timeout": float(site.collective_seconds),
    }


def parameters(site: Site, folder: Path) -> dict[str, Any]:
    """submitit's names for what a site gives."""
    found = {
        name: value
        for name in ("partition", "account", "qos", "constraint", "mem")
        if (value := getattr(site, name))
    }
    if site.gpus_per_node:
        found["gpus_per_node"] = (
            f"{site.gpu_type}:{site.gpus_per_node}" if site.gpu_type else site.gpus_per_node
        )
    python = shlex.quote(sys.executable)
    setup = [
        f"cd {shlex.quote(str(REPOSITORY))}",
        f"SUBMITTED_FROM={shlex.quote(str(folder.parents[1]))}",
        f"PYTHON=${{PYTHON:-{python}}}",
        "source slurm/job.sh || exit 2",
    ]
    return found | {
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


def sbatch_text(site: Site, folder: Path, num: int) -> str:
    """The batch script that submitit writes for `num` jobs."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f'"$PYTHON" -u -m submitit.core._submit {shlex.quote(str(folder))}'
    return _make_sbatch_string(
        command, folder, map_count=num if num > 1 else None, **parameters(site, folder)
    )


def submit(
    groups: Sequence[tuple[Site, Sequence[Job]]], store: Store, experiment: str, **resources: Any
) -> list[Submission]:
    """Send each group to Slurm as one array, leaving out stages that are in the queue; returns at once with what was sent.

    `experiment` is whose they are, for its --cancel; `resources` are the trainer's, beside those that a site gives.

    Raises ValueError with the scheduler's words, before anything is sent where it says so when asked.
    """
    import submitit

    folder = store.root / "submissions"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        queued = waiting_or_running(
            store.root,
            [spec_id(stage) for _, jobs in groups for job in jobs for stage in job.stages],
        )
        queued = {stage for submission in queued for stage in submission.stages}
        left = [
            (
                site,
                [job for job in jobs if not any(spec_id(stage) in queued for stage in job.stages)],
            )
            for site, jobs in groups
        ]
        left = [(site, jobs, new_folder(store.root)) for site, jobs in left if jobs]
        for site, jobs, folder in left:
            _ask(sbatch_text(site, folder, len(jobs)), store.root)
        sent = []
        for site, jobs, folder in left:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=UNBOUNDED, python='"$PYTHON"')
            executor.update_parameters(**parameters(site, folder))
            try:
                handles = executor.map_array(
                    task,
                    jobs,
                    [store.root.resolve()] * len(jobs),
                    [given(site) | resources] * len(jobs),
                )
            except submitit.core.utils.FailedJobError as error:
                before = (
                    f"; sent before it: {', '.join(f'job {one.job}' for one in sent)}"
                    if sent
                    else ""
                )
                raise ValueError(f"sbatch: {words(str(error))}{before}") from None
            part = []
            for job, handle in zip(jobs, handles, strict=True):
                log = handle.paths.stdout.relative_to(store.root.resolve())
                part.append(
                    Submission(
                        tuple(spec_id(stage) for stage in job.stages),
                        job.label,
                        handle.job_id,
                        folder.name,
                        str(log),
                        experiment=experiment,
                    )
                )
            remember(store.root, part)
            sent += part
    return sent


def _ask(text: str, root: Path) -> None:
    """Let the scheduler judge a batch script without queueing it; ValueError with its words where it refuses.

    What it would refuse today only, while nodes are drained or reserved, it queues all the same: that is a warning.
    """
    script = root / "submissions" / f".{uuid.uuid4().hex}.sh"
    script.write_text(text)
    try:
        client("sbatch", "--test-only", str(script))
    except ValueError as refusal:
        if NOT_NOW not in str(refusal):
            raise
        print(
            f"warning: {refusal}; sent all the same, for nodes may be drained or reserved: --status shows the reason",
            file=sys.stderr,
        )
    finally:
        script.unlink()


def run_locally(
    jobs: Sequence[Job],
    root: Path,
    device: str,
    workers: int,
    debug: bool,
    notify: Callable[[Job, str, Any], None],
    **resources: Any,
) -> bool:
    """As `launch.run_here`, but through submitit: `workers` at a time, or one by one in this process."""
    import submitit

    folder, began = new_folder(root), timestamp()
    resources |= {
        "device": device,
        "threads": max(1, available_cores() // (1 if debug else workers)),
    }
    if debug:
        executor = submitit.core.plugins.get_executors()["debug"](folder)
    else:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(
            timeout_min=60 * 24 * 365,
            gpus_per_node=1 if device == "cuda" else 0,
            stderr_to_stdout=True,
        )
    waiting, running, good = list(jobs), list[tuple[Job, Any]](), True
    try:
        while waiting or running:
            while waiting and len(running) < (1 if debug else workers):
                job = waiting.pop(0)
                running.append((job, executor.submit(task, job, root.resolve(), resources)))
            for job, handle in list(running):
                if debug or handle.done():
                    running.remove((job, handle))
                    good = (
                        _tell(
                            job, handle.exception(), Store(root), handle.paths.stdout, began, notify
                        )
                        and good
                    )
            if running:
                time.sleep(0.2)
    finally:
        for _, handle in running:
            handle.cancel(check=False)
    return good


def _tell(
    job: Job,
    error: BaseException | None,
    store: Store,
    log: Path,
    began: str,
    notify: Callable[[Job, str, Any], None],
) -> bool:
    """Report what a finished job has recorded since `began`; True if every stage is done."""
    records = [
        (stage, store.here.latest(stage) or store.here.latest(stage, status="failed"))
        for stage in job.stages
    ]
    records = [(stage, record) for stage, record in records if record and record.utc >= began]
    for stage, record in records:
        notify(job, "record", (stage, record))
    if error and not any(record.status == "failed" for _, record in records):
        notify(job, "error", f"{str(error).strip().splitlines()[-1]} (its log: {log})")
    notify(job, "end", None)
    return error is None
