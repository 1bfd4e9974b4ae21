"""Progress of running jobs on standard error: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from experiments.engine.jobs.job import Job, JobEvent
from experiments.engine.records.store import Record
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.spec import Stage, kind_of

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


def images_line(done: int, total: int, rate: float, unit: str = "images") -> str:
    """Return how far work over images is, at `rate` images per second, and the time left."""
    minutes, seconds = divmod(round((total - done) / rate), 60)
    left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return f"{done} of {total} {unit}, {rate:.1f} {unit}/s, {left} left"


class ProgressDisplay:
    """Shows the events of `pool.run_here`.

    Without a terminal there is a line for every stage that ends. With `lines` there is also a line
    for every progress.
    """

    def __init__(self, total: int, lines: bool = False) -> None:
        """Prepare to show `total` stages."""
        self.total = total
        self.lines = lines
        self.done = 0
        self.started = time.monotonic()
        self.bars: Bars | None = None
        # The bars of all stages, and of each job at work.
        self.all_stages: TaskID | None = None
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressDisplay:
        if sys.stderr.isatty() and self.total:
            self.bars = _start_bars()
            self.all_stages = self.bars.add_task("stages", total=self.total, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def notify(self, job: Job, event: JobEvent | str, payload: Any) -> None:
        """Show an event of a job."""
        if event == JobEvent.PROGRESS:
            self._show_progress(job, payload)
        elif event == JobEvent.RECORD:
            self._show_record(job, *payload)
        elif event == JobEvent.ERROR:
            self._print(f"error: {job.label}: {payload}")
        elif event == JobEvent.END:
            self._remove_bar(job)

    def _show_progress(self, job: Job, progress: Progress) -> None:
        if self.bars:
            if progress.loss is None:
                state = f"{progress.rate:.1f} images/s"
            else:
                state = f"loss {progress.loss:.4f}, {progress.rate:.0f} images/s"

            # The first report of a job adds its bar.
            if job.label not in self.tasks:
                self.tasks[job.label] = self.bars.add_task(
                    job.label, total=progress.total, state=""
                )

            self.bars.update(
                self.tasks[job.label], completed=progress.step, total=progress.total, state=state
            )
        elif self.lines:
            self._print(images_line(progress.step, progress.total, progress.rate))

    def _show_record(self, job: Job, stage: Stage, record: Record) -> None:
        self.done += 1
        if self.bars and self.all_stages is not None:
            self.bars.update(self.all_stages, completed=self.done)
        outcome = record.error or f"done in {record.provenance['seconds']:.1f} s"
        position = f"[{self.done}/{self.total}, {time.monotonic() - self.started:.0f} s]"
        self._print(f"{position} {job.label_of(stage)}: {kind_of(stage)} {outcome}")

    def _remove_bar(self, job: Job) -> None:
        task = self.tasks.pop(job.label, None)
        if self.bars and task is not None:
            self.bars.remove_task(task)

    def _print(self, line: str) -> None:
        if self.bars:
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _start_bars() -> Bars:
    """Start the bars of a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
    )
    bars.start()
    return bars


class ProgressLines:
    """Prints a line as shards get done by any process, with the time that is left."""

    def __init__(self, unit: str = "images") -> None:
        self.unit = unit
        self.started = 0.0
        self.first: int | None = None  # pictures that were done before
        self.last = 0

    def __call__(self, done: int, total: int) -> None:
        if self.first is None:
            self.started = time.monotonic()
            self.first = done
        elif done > self.last:
            rate = (done - self.first) / (time.monotonic() - self.started)
            print(images_line(done, total, rate, self.unit), file=sys.stderr, flush=True)
        self.last = done
