"""Jobs on this machine, each in a process of its own, so that a crash costs one job.

There is no torch in the parent process.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from experiments.engine.jobs.job import Job, JobEvent
from experiments.engine.machine.cores import find_cores
from experiments.engine.machine.lifetime import bind_to_parent, end_children, unwind
from experiments.engine.machine.sockets import prepare_socket_folder
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.code import Code, own_code, require_code
from experiments.engine.records.store import Record, Store
from experiments.engine.records.tree import own_environment

Notify = Callable[[Job, JobEvent, Any], None]


def run_here(
    jobs: Sequence[Job],
    root: Path,
    device: str,
    workers: int,
    threads: int,
    notify: Notify,
    **resources: Any,
) -> bool:
    """Run jobs in worker processes. An interrupt stops every process; what they wrote is whole.

    Args:
        jobs: What to run.
        root: The results folder.
        device: "cpu" or "cuda".
        workers: How many jobs run at a time.
        threads: How many threads a job has.
        notify: Hears of every event of a job. See JobEvent for the payloads.
        resources: Further resources of the trainer.

    Returns:
        Whether every job is done.
    """
    # Threads that spin for long starve each other on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Keeps the profiler's tracer from writing of its own work.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    pool = _Pool(root, device, threads, notify, resources)
    return pool.run(list(jobs), workers)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return find_cores().number


@dataclass
class _Worker:
    """A process that works on a job."""

    job: Job
    process: ForkServerProcess
    # Records of the job's stages so far.
    records: list[Record]


@dataclass
class _Pool:
    """Worker processes that share a machine."""

    root: Path
    device: str
    threads: int
    notify: Notify
    resources: dict[str, Any]
    running: dict[Connection, _Worker] = field(default_factory=dict)

    def run(self, waiting: list[Job], workers: int) -> bool:
        """Run all jobs, `workers` at a time, and return whether all are done."""
        # The server imports torch, so that a command with nothing to do starts none.
        if not waiting:
            return True
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["experiments.engine.jobs.execute"])
        # The server and its workers are to import the code of this command.
        os.environ.update(own_environment(os.environ))
        _start_server()
        good = True
        try:
            while waiting or self.running:
                while waiting and len(self.running) < workers:
                    self._start(waiting.pop(0), context)
                for pipe in wait(list(self.running)):
                    assert isinstance(pipe, Connection)
                    good = self._listen(pipe) and good
        finally:
            self._end_all()
        return good

    def _start(self, job: Job, context: ForkServerContext) -> None:
        ours, theirs = context.Pipe(duplex=False)
        place = (self.root, self.device, self.threads)
        arguments = (job, *place, theirs, self.resources, own_code())
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.running[ours] = _Worker(job, process, list(job.before))

    def _listen(self, pipe: Connection) -> bool:
        """Pass one event of a worker on, and return whether its job is still good."""
        worker = self.running[pipe]
        try:
            event, payload = pipe.recv()
        except EOFError:
            return self._end(pipe)
        if event == JobEvent.RECORD:
            _, record = payload
            worker.records.append(record)
        self.notify(worker.job, event, payload)
        return event != JobEvent.ERROR and not worker.job.failed(worker.records)

    def _end(self, pipe: Connection) -> bool:
        """Note that a worker has ended, and return whether it ended well."""
        worker = self.running.pop(pipe)
        worker.process.join()
        code = worker.process.exitcode
        if code:
            reason = f"its process ended with {_reason(code)}"
            self.notify(worker.job, JobEvent.ERROR, reason)
        self.notify(worker.job, JobEvent.END, None)
        return not code

    def _end_all(self) -> None:
        processes = [worker.process for worker in self.running.values()]
        end_children(processes, is_over=lambda process: not process.is_alive())


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _start_server() -> None:
    """Start the process that forks workers, with interrupts blocked for it and for them.

    The parent decides what an interrupt means, and ends the workers.
    """
    prepare_socket_folder()
    # The server would start the tracker itself, which unblocks interrupts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(  # noqa: PLR0913  (the arguments of a process)
    job: Job,
    root: Path,
    device: str,
    threads: int,
    pipe: Connection,
    resources: dict[str, Any],
    code: Code,
) -> None:
    """Run a job's stages in a worker process, and send its events through the pipe."""
    # The server ends with the command, and this process with the server. The command may have ended
    # while this process was being made.
    bind_to_parent()
    signal.signal(signal.SIGTERM, unwind)
    parent = mp.parent_process()
    if parent is None or not parent.is_alive():
        return

    import torch

    from experiments.engine.jobs.execute import execute
    from experiments.engine.runtime.context import Resources

    torch.set_num_threads(threads)
    store, records = Store(root), list(job.before)
    given = Resources(device=device, **resources)
    try:
        require_code(code, root)
        for stage in job.stages:
            record = execute(
                stage, store, given, lambda progress: pipe.send((JobEvent.PROGRESS, progress))
            )
            records.append(record)
            pipe.send((JobEvent.RECORD, (stage, record)))
            if job.ended(records):
                break
    except BrokenPipeError:
        return  # nobody listens any more
    except OSError as error:
        pipe.send((JobEvent.ERROR, explain(error)))
    except ValueError as error:
        pipe.send((JobEvent.ERROR, str(error)))
    finally:
        pipe.close()
