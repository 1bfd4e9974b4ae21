"""Jobs on this machine: each a process of its own, so that a crash costs one job; no torch in the parent."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from experiments.engine.records.store import Record, Store
from experiments.engine.runtime import preemption
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.spec import Stage, kind_of

GAIN = 1.02  # in images a second, for which a sweep goes on to the next batch


@dataclass(frozen=True)
class Job:
    """Stages that run one after another; in a `chain` evaluations follow trainings, and a training that fails ends it.

    `row` is the label under which a site file gives it resources, where that is not its own. `before` are the records of
    stages that ran earlier, where they matter to those that are left.
    """

    label: str
    stages: tuple[Stage, ...]
    chain: bool = False
    row: str = ""
    before: tuple[Record, ...] = ()

    def left(self, store: Store) -> Job:
        """The job without its stages that are done."""
        return replace(
            self,
            stages=tuple(stage for stage in self.stages if store.here.latest(stage) is None),
        )

    def ended(self, records: Sequence[Record]) -> bool:
        """Whether nothing is to run after the stages that gave these."""
        return self.chain and any(
            record.status != "done" and record.kind == "train" for record in records
        )

    def failed(self, records: Sequence[Record]) -> bool:
        return any(record.status != "done" for record in records)


class Sweep(Job):
    """Timings at growing batches until two in a row, of which one may be a busy moment, do not pay, or one fails, as for want of memory."""

    def left(self, store: Store) -> Sweep:
        tried = list(
            takewhile(lambda record: record is not None, map(store.here.latest, self.stages))
        )
        untried = self.stages[len(tried) :]
        if tried and untried and (failed := store.here.latest(untried[0], status="failed")):
            tried.append(failed)
        return replace(self, stages=() if self.ended(tried) else untried, before=tuple(tried))

    def ended(self, records: Sequence[Record]) -> bool:
        rates = [
            record.values["images_per_s"] if record.status == "done" else 0.0 for record in records
        ]
        return 0.0 in rates or (len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2]))

    def failed(self, records: Sequence[Record]) -> bool:
        """Only where not even the smallest batch could be timed."""
        return bool(records) and records[0].status != "done"


def run_here(
    jobs: Sequence[Job],
    root: Path,
    device: str,
    workers: int,
    threads: int,
    notify: Callable[[Job, str, Any], None],
    **resources: Any,
) -> bool:
    """Run jobs, `workers` at a time with `threads` threads each and further `resources` of the trainer; True if every one is done.

    `notify(job, event, payload)` hears 'progress' (a Progress), 'record' (stage, record),
    'error' (text) and 'end' (None). An interrupt stops every process; what they wrote is whole.
    """
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "10000"
    )  # threads that spin for long starve each other on a busy machine
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "5"
    )  # the profiler's tracer tells of its own doings otherwise
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["experiments.engine.jobs.execute"])
    _start_server()
    waiting, running = list(jobs), dict[Connection, tuple[Job, Any, list[Record]]]()
    good = True
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(job, root, device, threads, theirs, resources), daemon=True
                )
                process.start()
                theirs.close()
                running[ours] = (job, process, list(job.before))
            for pipe in wait(list(running)):
                job, process, records = running[pipe]
                try:
                    event, payload = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if process.exitcode:
                        good = False
                        notify(job, "error", f"its process ended with {_reason(process.exitcode)}")
                    notify(job, "end", None)
                    continue
                if event == "record":
                    records.append(payload[1])
                good = good and event != "error" and not job.failed(records)
                notify(job, event, payload)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join(5)
    return good


def unwind(number: int, _: Any) -> NoReturn:
    """For signals: end this process so that half-written files are removed and workers ended."""
    sys.exit(128 + number)


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _start_server() -> None:
    """Start the process that forks workers with interrupts blocked for it and for them: the parent decides, and ends them."""
    resource_tracker.ensure_running()  # the server would start it, which unblocks interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    job: Job, root: Path, device: str, threads: int, pipe: Connection, resources: dict[str, Any]
) -> None:
    signal.signal(signal.SIGTERM, unwind)
    if not mp.parent_process().is_alive():  # it was interrupted while this process was being made
        return
    import torch

    from experiments.engine.jobs.execute import execute
    from experiments.engine.runtime.context import Resources

    torch.set_num_threads(threads)
    store, records = Store(root), list(job.before)
    try:
        for stage in job.stages:
            records.append(
                execute(
                    stage,
                    store,
                    Resources(device=device, **resources),
                    lambda progress: pipe.send(("progress", progress)),
                )
            )
            pipe.send(("record", (stage, records[-1])))
            if job.ended(records):
                break
    except BrokenPipeError:
        return  # nobody listens any more
    except (OSError, ValueError) as error:
        full = (
            f"cannot write results ({error.strerror}); free space or choose another folder with --results"
            if isinstance(error, OSError)
            else ""
        )
        pipe.send(("error", full or str(error)))
    finally:
        pipe.close()


def work_in_job(
    job: Job, root: Path, device: str, threads: int | None = None, **resources: Any
) -> str | None:
    """What one process of a scheduled job runs: its stages in order, with `resources` of the trainer. The first error in one line, or None.

    Several processes are one group, of which each calls this. Where the batch script asks for signs ($DICO_JOB, a path
    without its end) the first leaves the folder of the run in `.run` and removes `.restarts` as the run gets on, and any
    leaves `.failed` for an error that another attempt would meet too.
    """
    if preemption.in_a_job():
        preemption.listen()
    import torch

    from experiments.engine.jobs.execute import execute
    from experiments.engine.runtime.context import Resources

    if threads := threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "0")):
        torch.set_num_threads(threads)
    store, error, records = Store(root), None, list(job.before)

    def report(progress: Progress) -> None:
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        position = f"step {progress.step} of {progress.total}"
        print(f"{job.label}: {position}{loss}, {progress.rate:.0f} images/s", flush=True)
        _write_marker("restarts", None)

    try:
        store.check_writable()
        for stage in job.stages:
            _write_marker("run", str(store.run_dir(stage)))
            record = execute(stage, store, Resources(device=device, **resources), report)
            print(f"{job.label}: {kind_of(stage)} {record.error or 'done'}", flush=True)
            _write_marker("restarts", None)
            records.append(record)
            if record.status != "done" and job.failed(records):
                error = f"{job.label}: {kind_of(stage)} failed: {record.error}"
            if job.ended(records) or _lost_its_group(record):
                break
    except (OSError, ValueError) as failure:
        full = (
            f"cannot write results ({failure.strerror}); free space there"
            if isinstance(failure, OSError)
            else str(failure)
        )
        error = f"{socket.gethostname()}: {full}"
    if error:
        _write_marker("failed", error)
    return error


def _lost_its_group(record: Record) -> bool:
    """Whether a stage failed in a group of processes, of which only the first one is left."""
    return record.status != "done" and record.provenance["world_size"] > 1


def _write_marker(end: str, text: str | None) -> None:
    """Write, or remove, a sign for the batch script."""
    if start := os.environ.get("DICO_JOB"):
        with suppress(OSError):
            path = Path(f"{start}.{end}")
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
