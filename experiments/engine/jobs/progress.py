"""Progress of running jobs on standard error: bars on a terminal, a line a stage otherwise, and a line a chunk where it is asked for."""

from __future__ import annotations

import sys
import time
from typing import Any

from experiments.engine.jobs.pool import Job
from experiments.engine.specs.spec import kind_of


def images_line(done: int, total: int, rate: float) -> str:
    """How far a work over images is, at `rate` a second, and the time that is left."""
    minutes, seconds = divmod(round((total - done) / rate), 60)
    return f"{done} of {total} images, {rate:.1f} images/s, {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


class ProgressDisplay:
    """`notify` takes the events of `launch.run_here`; `total` counts stages. `lines` says each piece of a drawing where there are no bars."""

    def __init__(self, total: int, lines: bool = False) -> None:
        self.lines, self.total, self.done, self.started, self.bars = (
            lines,
            total,
            0,
            time.monotonic(),
            None,
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressDisplay:
        if sys.stderr.isatty() and self.total:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self.bars = Bars(*columns, console=Console(stderr=True))
            self.bars.start()
            self.whole = self.bars.add_task("stages", total=self.total, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def notify(self, job: Job, event: str, payload: Any) -> None:
        if event == "progress" and self.bars:
            progress = payload
            if job.label not in self.tasks:
                self.tasks[job.label] = self.bars.add_task(
                    job.label, total=progress.total, state=""
                )
            if progress.loss is None:  # of a sampling
                state = f"{progress.rate:.1f} images/s"
            else:
                state = f"loss {progress.loss:.4f}, {progress.rate:.0f} images/s"
            self.bars.update(
                self.tasks[job.label],
                completed=progress.step,
                total=progress.total,
                state=state,
            )
        elif event == "progress" and self.lines:
            self._say(images_line(payload.step, payload.total, payload.rate))
        elif event == "record":
            stage, record = payload
            self.done += 1
            if self.bars:
                self.bars.update(self.whole, completed=self.done)
            outcome = record.error or f"done in {record.provenance['seconds']:.1f} s"
            self._say(
                f"[{self.done}/{self.total}, {time.monotonic() - self.started:.0f} s] {job.label}: {kind_of(stage)} {outcome}"
            )
        elif event == "error":
            self._say(f"error: {job.label}: {payload}")
        elif event == "end" and job.label in self.tasks:
            self.bars.remove_task(self.tasks.pop(job.label))

    def _say(self, line: str) -> None:
        if self.bars:
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)
