"""Run jobs on this machine through submitit, as Slurm would start them, or inside this process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.engine.cluster.submit import new_folder, run_job
from experiments.engine.jobs.job import Job, JobEvent
from experiments.engine.jobs.pool import Notify, available_cores
from experiments.engine.machine.lifetime import end_children, unwind
from experiments.engine.records.code import Code, own_code
from experiments.engine.records.store import Store, timestamp
from experiments.engine.records.tree import own_environment

POLL_SECONDS = 0.2


def run_locally(
    jobs: Sequence[Job],
    root: Path,
    device: str,
    workers: int,
    debug: bool,
    notify: Notify,
    **resources: Any,
) -> bool:
    """Run jobs as `pool.run_here` does, but through submitit. Return True if every one is done.

    Args:
        workers: jobs that run side by side. With `debug` jobs run one by one in this process.
        resources: resources of the trainer.
    """
    workers = 1 if debug else workers
    threads = max(1, available_cores() // workers)
    all_resources = resources | {"device": device, "threads": threads}
    # The processes that submitit starts are to import the code of this command.
    os.environ.update(own_environment(os.environ))
    processes: list[subprocess.Popen[bytes]] = []
    executor = _executor(new_folder(root), processes, debug)
    work = run_job if debug else run_child
    began = timestamp()

    waiting = list(jobs)
    running: list[tuple[Job, Any]] = []
    all_done = True
    try:
        while waiting or running:
            # Start jobs while there is room.
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                handle = executor.submit(work, job, root.resolve(), all_resources, own_code())
                running.append((job, handle))

            # Report the jobs that have ended. In this process `exception` runs the job.
            for job, handle in list(running):
                if debug or handle.done():
                    error = handle.exception()
                    running.remove((job, handle))
                    report_end(job, error, Store(root), handle.paths.stdout, began, notify)
                    all_done = all_done and error is None
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        end_children(processes, is_over=lambda child: child.poll() is not None)
    return all_done


def _executor(folder: Path, processes: list[subprocess.Popen[bytes]], debug: bool) -> Any:
    """Return an executor of submitit: for this process, or for children that join `processes`."""
    import submitit

    if debug:
        return submitit.core.plugins.get_executors()["debug"](folder)

    from experiments.engine.cluster.children import child_executor

    return child_executor(folder, processes)


def run_child(job: Job, root: Path, resources: dict[str, Any], code: Code) -> None:
    """Run a job as `run_job` does, in a process that leaves interrupts to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, unwind)
    run_job(job, root, resources, code)


def report_end(
    job: Job,
    error: BaseException | None,
    store: Store,
    log: Path,
    began: str,
    notify: Notify,
) -> None:
    """Report what a job has recorded since `began`, and its error if no record holds one."""
    failed = False
    for stage in job.stages:
        record = store.here.latest(stage) or store.here.latest(stage, status="failed")
        if record and record.utc >= began:
            failed = failed or record.status == "failed"
            notify(job, JobEvent.RECORD, (stage, record))

    if error and not failed:
        last_line = str(error).strip().splitlines()[-1]
        notify(job, JobEvent.ERROR, f"{last_line} (its log: {log})")
    notify(job, JobEvent.END, None)
