"""From a spec to its record: run a stage once, keep what it gave or why it failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from backbones import kernels
from experiments.engine.numerics import device as machine
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.store import Record, Store, provenance
from experiments.engine.runtime import group as distributed
from experiments.engine.runtime import heartbeat, preemption
from experiments.engine.runtime import heartbeat as attempts
from experiments.engine.runtime.group import Group
from experiments.engine.runtime.heartbeat import Heartbeat
from experiments.engine.sampling.generate import can_capture_steps
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import Ceilings, Cost, Evaluate, Profile, Stage, Timing, Train
from experiments.engine.timing import cost
from experiments.engine.timing import profile as ceilings
from experiments.engine.timing import profile as profiling
from experiments.engine.timing import stage as timing
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Resources

Report = Callable[[int, int, float, float], None]


def execute(spec: Stage, store: Store, resources: Resources, report: Report) -> Record:
    """The stage's record: an old one if it is done, else a new one. Failures are records too.

    In a group of processes every rank calls this and gets the record; the first one writes it. A rank that fails ends the
    whole group: the record holds its error, and all ranks but the first exit. Another process at the same stage is waited
    for, another job refused (ValueError). Raises OSError where results cannot be written, and SystemExit, with status
    75 when the job was asked to stop (`preemption.listen` makes it hear) and has saved, with 137 when it has lost a rank.
    """
    require_device(resources.device)
    machine.keep_memory()
    group = distributed.join(resources.device, resources.timeout)
    folder = store.run_dir(spec)
    if not group.first:
        return _follow(spec, store, resources, group)
    with ExitStack() as held:
        try:
            beat = held.enter_context(_held(spec, store, group))
        except ValueError as refusal:
            group.share(refusal)
            raise
        store.refresh()
        distributed.clear_errors(folder)
        if done := group.share(store.here.latest(spec)):
            if beat:
                beat.end("done")
            return done
        kernels.reset_used()
        started = time.perf_counter()

        def finish(status: str, values: dict[str, Any], error: str | None = None) -> Record:
            if beat:
                attempts.end_attempt(folder, beat.fields["step"] or 0, error or status)
                if found := attempts.read_attempts(folder):
                    values = values | {"attempts": found}
            record = store.append(
                spec,
                status,
                values,
                _provenance(spec, resources, group, time.perf_counter() - started),
                error,
            )
            if beat:
                beat.end(status, error)
            return record

        try:
            with distributed.Watch(group, folder, lambda error: finish("failed", {}, error)):
                values = _run(spec, store, resources, report, group, beat)
        except preemption.Preempted as stop:
            _leave(stop, folder, group, beat)
        except OSError as error:
            distributed.report_error(folder, group, distributed.one_line(error))
            if beat:
                attempts.end_attempt(folder, beat.fields["step"] or 0, distributed.one_line(error))
                beat.end("failed", distributed.one_line(error))
            raise
        except Exception as failure:  # a failed row is a result, and the others go on
            try:
                error = distributed.cause(folder, group, failure)
            except distributed.Lost as lost:
                _leave(lost, folder, group, beat)
            return finish("failed", getattr(failure, "values", {}), error)
        return group.share(finish("done", values))


def _follow(spec: Stage, store: Store, resources: Resources, group: Group) -> Record:
    """A rank after the first: works on its part, and exits where any rank fails."""
    folder = store.run_dir(spec)
    try:
        answer = group.share(None)
        if answer is None:
            with distributed.Watch(group, folder):
                if isinstance(spec, Train | Evaluate):
                    _run(spec, store, resources, lambda *_: None, group, None)
            answer = group.share(None)
    except preemption.Preempted as stop:
        _leave(stop, folder, group, None)
    except Exception as failure:
        try:
            print(
                f"error: {distributed.cause(folder, group, failure)}", file=sys.stderr, flush=True
            )
            _outlast_the_record(folder)
        except distributed.Lost as lost:
            _leave(lost, folder, group, None)
        raise SystemExit(1) from None
    if isinstance(answer, ValueError):  # another job has the run: every rank says so
        raise answer
    return answer


def _outlast_the_record(folder: Path) -> None:
    """Wait until the first rank has written why the run failed: a scheduler may end it as soon as this rank ends."""
    end = time.monotonic() + distributed.POLL + 2 * distributed.GRACE
    while heartbeat.live(heartbeat.read(folder)) and time.monotonic() < end:
        time.sleep(0.1)


def _held(spec: Stage, store: Store, group: Group) -> AbstractContextManager[Heartbeat | None]:
    """The stage's lock; a stage of hours also shows a heartbeat."""
    return (
        heartbeat.claimed(store.run_dir(spec), group.world_size)
        if isinstance(spec, Train | Evaluate)
        else store.lock(spec)
    )


def _leave(
    why: preemption.Preempted | distributed.Lost, folder: Path, group: Group, beat: Heartbeat | None
) -> NoReturn:
    """End this process before the end of its stage; if it was asked to make room, the job goes back into the queue.

    Ranks that stop together wait for what the first one has to write and to ask for: a scheduler may end all when one ends.
    """
    how, reason = preemption.NO, str(why)
    if isinstance(why, preemption.Preempted):
        how = _agreed(group, preemption.meant(why.how) if group.first else preemption.STOP)
        reason += (
            ""
            if how == why.how
            else ", to make room"
            if how == preemption.REQUEUE
            else ", and to end"
        )
    back = how == preemption.REQUEUE and heartbeat.job_id() is not None
    if back:
        preemption.yield_to_terminations()
    if beat:
        if how != preemption.TAKEN_OVER:
            attempts.end_attempt(folder, beat.fields["step"] or 0, reason)
        beat.end("requeued" if back else "stopped", reason)
        print(f"stopped: {reason}", file=sys.stderr, flush=True)
    refusal = preemption.requeue() if back and group.first else None
    if refusal:
        refusal = f"{reason}; saved, but the job could not be requeued: {refusal}"
        print(f"error: {refusal}; submit it again", file=sys.stderr, flush=True)
        if beat:
            beat.correct("stopped", refusal)
    if isinstance(why, preemption.Preempted):
        refusal = _agreed(group, refusal)
    if back and not refusal:
        preemption.wait_for_the_end()
    raise SystemExit(preemption.LOST if isinstance(why, distributed.Lost) else preemption.TRY_AGAIN)


def _agreed(group: Group, answer: Any) -> Any:
    """The first rank's answer; one's own where the scheduler has ended a rank already."""
    with suppress(RuntimeError):
        return group.share(answer)
    return answer


def require_device(device: str) -> None:
    """Raise ValueError in one line if a GPU was asked for and torch cannot use one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"no usable GPU: torch {torch.__version__} was built for CUDA {torch.version.cuda}; update the driver or pass --device cpu"
        )


def _run(
    spec: Stage,
    store: Store,
    resources: Resources,
    report: Report,
    group: Group,
    beat: Heartbeat | None,
) -> dict[str, Any]:
    if isinstance(spec, Cost):
        return cost.count_backbone(spec)
    if isinstance(spec, Timing):
        return timing.measure_speed(spec)
    if isinstance(spec, Ceilings):
        return ceilings.measure_ceilings(spec)
    if isinstance(spec, Profile):
        return profiling.profile_task(spec, store.run_dir(spec))
    if isinstance(spec, Train):
        return run_training(spec, store.run_dir(spec), resources, report, group, beat)
    assert isinstance(spec, Evaluate), spec
    return evaluate.run(
        spec,
        store.run_dir(spec.train),
        store.root / "runs" / "classifiers",
        resources,
        group,
        beat,
        report,
    )


def _provenance(spec: Stage, resources: Resources, group: Group, seconds: float) -> dict[str, Any]:
    device = torch.device(resources.device)
    with precision(getattr(getattr(spec, "recipe", spec), "precision", "fp32"), device):
        in_force = read_tf32_flags()
    return (
        provenance()
        | machine.describe_device(device)
        | {
            "world_size": group.world_size,
            "micro_batch": resources.micro_batch,
            "sample_batch": resources.sample_batch,
            "compiled": getattr(spec, "compile", resources.compile),
            "graphs": getattr(
                spec,
                "graphs",
                resources.graphs
                and (
                    can_capture_steps(spec) if isinstance(spec, Evaluate) else group.world_size == 1
                ),
            ),
            "precision_flags": in_force,
            "kernels": kernels.used(),
            "seconds": round(seconds, 2),
        }
    )
