"""What the processes of a scheduled job run. No torch until the work begins."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from experiments.engine.jobs.job import Job
from experiments.engine.machine.cores import find_cores
from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.streams import replace_unprintable
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.store import Record, Store
from experiments.engine.records.tree import warn_without_commit
from experiments.engine.runtime import preemption
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.spec import kind_of


class Marker(StrEnum):
    """Ends of the names of the files that tell a batch script how its job fares."""

    # Holds the folder of the run that is at work.
    RUN = "run"
    # The batch script counts restarts here; progress removes the file.
    RESTARTS = "restarts"
    # Holds an error that another attempt would meet too.
    FAILED = "failed"


def work_in_job(
    job: Job, root: Path, device: str, threads: int | None = None, **resources: Any
) -> str | None:
    """Run the stages of a scheduled job in order, and return the first error in one line, or None.

    Several processes are one group, of which each calls this. With $DICO_JOB set, the processes
    leave markers for the batch script beside that path (see Marker).

    Args:
        job: What to run.
        root: The results folder.
        device: "cpu" or "cuda".
        threads: How many threads this process has. None: as many as it has cores.
        resources: Further resources of the trainer.
    """
    # A signal must find a listener before the slow imports.
    if preemption.in_a_job():
        preemption.listen()
    replace_unprintable()
    import torch

    torch.set_num_threads(threads or find_cores().number)

    try:
        error = _run_stages(job, Store(root), device, resources)
    except OSError as failure:
        error = f"{socket.gethostname()}: {explain(failure)}"
    except ValueError as failure:
        error = f"{socket.gethostname()}: {failure}"
    if error:
        _write_marker(Marker.FAILED, error)
    return error


def _run_stages(job: Job, store: Store, device: str, resources: dict[str, Any]) -> str | None:
    """Run stages until the job ends, print how each of them ends, and return the last error."""
    from experiments.engine.jobs.execute import execute
    from experiments.engine.runtime.context import Resources

    def report(progress: Progress) -> None:
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        position = f"step {progress.step} of {progress.total}"
        print(f"{label}: {position}{loss}, {progress.rate:.0f} images/s", flush=True)
        _write_marker(Marker.RESTARTS, None)

    error, records = None, list(job.before)
    store.check_writable()
    warn_without_commit()
    for stage in job.stages:
        label = job.label_of(stage)
        _write_marker(Marker.RUN, str(store.run_dir(stage)))
        record = execute(stage, store, Resources(device=device, **resources), report)
        print(f"{label}: {kind_of(stage)} {record.error or 'done'}", flush=True)
        _write_marker(Marker.RESTARTS, None)
        records.append(record)
        if record.status != "done" and job.failed(records):
            error = f"{label}: {kind_of(stage)} failed: {record.error}"
        if job.ended(records) or _lost_its_group(record):
            break
    return error


def _lost_its_group(record: Record) -> bool:
    """Return whether a stage failed in a group of processes, of which only rank 0 is left."""
    return record.status != "done" and record.provenance["world_size"] > 1


def _write_marker(marker: Marker, text: str | None) -> None:
    """Write a marker for the batch script, or remove it if there is no text."""
    start = read_variable("DICO_JOB")
    if not start:
        return
    path = Path(f"{start}.{marker}")
    with suppress(OSError):
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(os.fsencode(text))
