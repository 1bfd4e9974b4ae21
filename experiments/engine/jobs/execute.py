"""From a spec to its record: run a stage once, and keep its results or why it failed."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from backbones import kernels
from experiments.engine.machine.gpu import require_device
from experiments.engine.numerics import device as machine
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.store import Record, Store, provenance
from experiments.engine.runtime import failures, preemption
from experiments.engine.runtime.attempts import end_attempt, read_attempts
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.failures import FailureWatch, RankLost
from experiments.engine.runtime.group import Group, join_group, one_line
from experiments.engine.runtime.heartbeat import (
    Heartbeat,
    RunState,
    claim_run,
    is_live,
    job_id,
    read_heartbeat,
)
from experiments.engine.runtime.preemption import Preempted, StopRequest, resolve_stop
from experiments.engine.runtime.progress import Report, ignore_progress
from experiments.engine.sampling.generate import can_capture_steps
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import (
    Ceilings,
    Evaluate,
    HeldOut,
    Latency,
    Profile,
    Stage,
    Timing,
    Train,
)
from experiments.engine.timing import ceilings, scale_cost
from experiments.engine.timing import profile as profiling
from experiments.engine.timing import stage as timing
from experiments.engine.timing.inference import latency
from experiments.engine.training.heldout import measure_heldout
from experiments.engine.training.stage import run_training


@dataclass(frozen=True)
class _Execution:
    """One execution of a stage by one process of a group."""

    spec: Stage
    store: Store
    # Its folder is the stage's own: there lie the lock, the heartbeat and the errors of ranks.
    context: RunContext
    # When the execution started, by `time.perf_counter`.
    started: float

    @property
    def step(self) -> int:
        """The step of the last heartbeat."""
        return (self.context.heartbeat and self.context.heartbeat.fields["step"]) or 0

    def finish(self, status: str, values: dict[str, Any], error: str | None = None) -> Record:
        """Append the record, then close the attempt and the heartbeat."""
        folder, heartbeat = self.context.folder, self.context.heartbeat
        if heartbeat:
            end_attempt(folder, self.step, error or status)
            attempts = read_attempts(folder)
            if attempts:
                values = values | {"attempts": attempts}
        seconds = time.perf_counter() - self.started
        origin = _provenance(self.spec, self.context, seconds)
        record = self.store.append(self.spec, status, values, origin, error)
        if heartbeat:
            heartbeat.end(RunState(status), error)
        return record

    def give_up(self, error: str) -> None:
        """Close the attempt and the heartbeat without a record."""
        if self.context.heartbeat:
            end_attempt(self.context.folder, self.step, error)
            self.context.heartbeat.end(RunState.FAILED, error)


def execute(
    spec: Stage, store: Store, resources: Resources, report: Report = ignore_progress
) -> Record:
    """Return the stage's record: an old one if it is done, else a new one.

    A failure is recorded too.

    In a group, every rank calls this and gets the record, which rank 0 writes. If a rank fails,
    the whole group ends: the record holds the error, and all ranks but rank 0 exit. Another
    process that works on the stage is waited for.

    Raises:
        ValueError: Another job works on the stage.
        OSError: Results cannot be written.
        SystemExit: With status 75 after the job was asked to stop and has saved, with status 137
            after another rank was lost.
    """
    require_device(resources.device)
    machine.keep_memory()
    group = join_group(resources.device, resources.timeout)
    context = RunContext(store.run_dir(spec), resources, group)
    if group.first:
        return _lead(spec, store, replace(context, report=report))
    return _follow(spec, store, context)


def _lead(spec: Stage, store: Store, context: RunContext) -> Record:
    """Run the stage as rank 0, which holds its lock and writes its record."""
    group = context.group
    with ExitStack() as held:
        # The other ranks wait for an answer: a refusal, an old record, or None for work.
        try:
            heartbeat = held.enter_context(_hold(spec, store, group))
        except ValueError as refusal:
            group.broadcast(refusal)
            raise
        store.refresh()
        failures.clear_errors(context.folder)
        done = group.broadcast(store.here.latest(spec))
        if done:
            if heartbeat:
                heartbeat.end(RunState.DONE)
            return done

        kernels.reset_used()
        execution = _Execution(
            spec, store, replace(context, heartbeat=heartbeat), time.perf_counter()
        )
        return _work(execution)


def _work(execution: _Execution) -> Record:
    """Run the stage on rank 0, and turn whatever happens into a record or an exit status."""
    context = execution.context
    folder, group = context.folder, context.group

    def fail(error: str) -> Record:
        return execution.finish("failed", {}, error)

    try:
        with FailureWatch(group, folder, fail):
            values = _run_stage(execution.spec, execution.store, context)
    except Preempted as stop:
        _leave(stop, context)
    except OSError as failure:
        failures.report_error(folder, group, one_line(failure))
        execution.give_up(one_line(failure))
        raise
    except Exception as failure:  # a failed row is a result, and the others go on
        try:
            error = failures.explain_failure(folder, group, failure)
        except RankLost as lost:
            _leave(lost, context)
        return execution.finish("failed", getattr(failure, "values", {}), error)
    return group.broadcast(execution.finish("done", values))


def _follow(spec: Stage, store: Store, context: RunContext) -> Record:
    """Run this rank's share of a stage that rank 0 leads, and exit if any rank fails."""
    folder, group = context.folder, context.group
    try:
        answer = group.broadcast(None)
        if answer is None:
            with FailureWatch(group, folder):
                if isinstance(spec, Train | Evaluate):
                    _run_stage(spec, store, context)
            answer = group.broadcast(None)
    except Preempted as stop:
        _leave(stop, context)
    except Exception as failure:
        try:
            error = failures.explain_failure(folder, group, failure)
            print(f"error: {error}", file=sys.stderr, flush=True)
            _outlast_the_record(folder)
        except RankLost as lost:
            _leave(lost, context)
        raise SystemExit(1) from None

    # Another job has the run: every rank says so.
    if isinstance(answer, ValueError):
        raise answer
    return answer


def _outlast_the_record(folder: Path) -> None:
    """Wait until rank 0 has recorded the failure: a scheduler may end it once this rank ends."""
    end = time.monotonic() + failures.POLL + 2 * failures.GRACE
    # The failure is the error to report, and not that its record cannot be seen.
    with suppress(OSError):
        while is_live(read_heartbeat(folder)) and time.monotonic() < end:
            time.sleep(0.1)


def _hold(spec: Stage, store: Store, group: Group) -> AbstractContextManager[Heartbeat | None]:
    """Hold the stage's lock. Stages that can take hours also show a heartbeat."""
    if isinstance(spec, Train | Evaluate):
        return claim_run(store.run_dir(spec), group.world_size)
    return store.lock(spec)


def _leave(why: Preempted | RankLost, context: RunContext) -> NoReturn:
    """End this process before the end of its stage, and requeue the job if it should make room.

    Ranks that stop together wait until rank 0 has written and requeued: a scheduler may end all
    ranks once one of them ends.
    """
    group, heartbeat = context.group, context.heartbeat
    if isinstance(why, RankLost):
        _close(heartbeat, context.folder, RunState.STOPPED, str(why))
        raise SystemExit(preemption.LOST)

    # Rank 0 asks the scheduler what the signal means, and all ranks follow its answer.
    request = resolve_stop(why.request) if group.first else StopRequest.STOP
    request = _agree(group, request)
    returns_to_queue = request == StopRequest.REQUEUE and job_id() is not None
    if returns_to_queue:
        preemption.yield_to_terminations()

    reason = _reason(why, request)
    state = RunState.REQUEUED if returns_to_queue else RunState.STOPPED
    _close(heartbeat, context.folder, state, reason, request != StopRequest.TAKEN_OVER)

    # A scheduler that refuses leaves a job that is stopped after all.
    refusal = preemption.requeue() if returns_to_queue and group.first else None
    if refusal:
        refusal = f"{reason}; saved, but the job could not be requeued: {refusal}"
        print(f"error: {refusal}; submit it again", file=sys.stderr, flush=True)
        if heartbeat:
            heartbeat.correct(RunState.STOPPED, refusal)
    refusal = _agree(group, refusal)
    if returns_to_queue and not refusal:
        preemption.wait_for_the_end()
    raise SystemExit(preemption.TRY_AGAIN)


def _reason(why: Preempted, request: StopRequest) -> str:
    """Return why the run stops, with the scheduler's meaning if that differs from the signal's."""
    if request == why.request:
        return str(why)
    if request == StopRequest.REQUEUE:
        return f"{why}, to make room"
    return f"{why}, and to end"


def _close(
    heartbeat: Heartbeat | None,
    folder: Path,
    state: RunState,
    reason: str,
    ends_attempt: bool = True,
) -> None:
    """Close the attempt and the heartbeat of a run that stops early, on the rank that has them."""
    if heartbeat is None:
        return
    if ends_attempt:
        end_attempt(folder, heartbeat.fields["step"] or 0, reason)
    heartbeat.end(state, reason)
    print(f"stopped: {reason}", file=sys.stderr, flush=True)


def _agree(group: Group, answer: Any) -> Any:
    """Return rank 0's answer, or this rank's own if the scheduler has already ended a rank."""
    with suppress(RuntimeError):
        return group.broadcast(answer)
    return answer


def _run_stage(spec: Stage, store: Store, context: RunContext) -> dict[str, Any]:
    """Do the work of a stage and return the values of its record."""
    if isinstance(spec, Train):
        return run_training(spec, context)
    if isinstance(spec, Evaluate):
        training = replace(context, folder=store.run_dir(spec.train))
        return evaluate.run_evaluation(spec, store.root / "runs" / "classifiers", training)
    if isinstance(spec, HeldOut):
        return measure_heldout(spec, store.run_dir(spec.train), context.device)
    if isinstance(spec, Profile):
        return profiling.profile_task(spec, context.folder)
    if isinstance(spec, Ceilings):
        return ceilings.measure_ceilings(spec)
    if isinstance(spec, Timing):
        return timing.measure_speed(spec)
    if isinstance(spec, Latency):
        return latency.measure_latency(spec)
    return scale_cost.count_declared(spec)


def _provenance(spec: Stage, context: RunContext, seconds: float) -> dict[str, Any]:
    """Return what produced a record: code, machine, processes, numerics and time."""
    resources, group = context.resources, context.group
    with precision(_precision_of(spec), context.device):
        in_force = read_tf32_flags()

    # A timing declares itself whether it is compiled or runs by CUDA graphs.
    declared = getattr(spec, "timing", spec)
    if isinstance(spec, Evaluate):
        uses_graphs = resources.graphs and can_capture_steps(spec)
    else:
        uses_graphs = resources.graphs and group.world_size == 1
    return (
        provenance()
        | machine.describe_device(context.device)
        | {
            "world_size": group.world_size,
            "micro_batch": resources.micro_batch,
            "recompute": resources.recompute,
            "fully_sharded": resources.fully_shard and group.world_size > 1,
            "sample_batch": resources.sample_batch,
            "compiled": getattr(declared, "compile", resources.compile),
            "graphs": getattr(declared, "graphs", uses_graphs),
            "precision_flags": in_force,
            "kernels": kernels.used(),
            "seconds": round(seconds, 2),
        }
    )


def _precision_of(spec: Stage) -> str:
    """Return the declared precision. A training declares it in its recipe, a count has none."""
    if isinstance(spec, Train):
        return spec.recipe.precision
    return getattr(getattr(spec, "timing", spec), "precision", "fp32")
