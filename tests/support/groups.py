"""Groups of processes that run a stage for a test, and faults that strike them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.jobs.execute import execute
from experiments.engine.judges import classifiers
from experiments.engine.records.store import Record, Store
from experiments.engine.runtime import failures, preemption
from experiments.engine.runtime.context import Resources
from experiments.engine.runtime.group import Group
from experiments.engine.runtime.heartbeat import is_live, read_heartbeat
from experiments.engine.sampling import batches
from experiments.engine.specs.spec import Recipe, Stage, Train, spec_id
from experiments.engine.training import stage as training_stage
from experiments.engine.training.trainer import Trainer
from tests.support.trainings import DICO, DIGITS

TRAIN = Train(DICO, DIGITS, Recipe(steps=14, batch=16, lr=1e-3, warmup=4, ema=0.9))
BOUND = 180.0  # seconds: far more than any group needs, and far less than a hang takes

_PRELOAD = [
    "experiments.engine.jobs.execute",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard",
]


class FaultKind(StrEnum):
    """What happens to a rank at a step."""

    RAISE = "raise"
    # One rank raises, while the others do not come to a collective.
    RAISE_WHILE_OTHERS_HANG = "raise while others hang"
    KILL = "kill"
    # SIGTERM and SIGUSR2.
    STOP = "stop"
    REQUEUE = "requeue"
    # Falls silent until the others have left.
    HANG = "hang"
    # From this step on, a loss that is not a number, or far too high.
    NAN = "nan"
    SPIKE = "spike"


_SIGNALS = {
    FaultKind.KILL: signal.SIGKILL,
    FaultKind.STOP: signal.SIGTERM,
    FaultKind.REQUEUE: signal.SIGUSR2,
}


@dataclass(frozen=True)
class Fault:
    kind: FaultKind
    rank: int
    # The steps that were made before it strikes.
    step: int

    def strike(self, folder: Path) -> None:
        """Do to this process what happens to it at the step."""
        if self.kind == FaultKind.HANG:
            while is_live(read_heartbeat(folder)):
                time.sleep(0.1)
        elif self.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.kind])
        elif self.kind in (FaultKind.RAISE, FaultKind.RAISE_WHILE_OTHERS_HANG):
            raise KeyError("boom")


@dataclass(frozen=True)
class Work:
    """What a group does in a test."""

    root: Path
    stage: Stage = TRAIN
    fault: Fault | None = None
    # Whether each rank writes the inputs of its losses to seen-<rank>.pt.
    keeps_inputs: bool = False
    resources: Resources = field(
        default_factory=lambda: Resources(checkpoint_every=5, timeout=BOUND)
    )


def run_member(group: Group, port: int, work: Work) -> None:
    """Work as one rank, and exit with status 0 if the stage is done."""
    torch.set_num_threads(1)
    preemption.listen()
    _hurry()
    if group.world_size > 1:
        declare(group, port)

    # What the test asks for beside the work.
    if work.fault:
        _arm(work.fault, group, Store(work.root).run_dir(work.stage))
    inputs: list[tuple[Tensor, ...]] = []
    if work.keeps_inputs:
        _keep_inputs(inputs)

    # A refusal is left in a file, since nobody reads what a rank prints.
    try:
        record = execute(work.stage, Store(work.root), work.resources)
    except ValueError as refusal:
        (work.root / f"refusal-{group.rank}").write_text(str(refusal))
        raise SystemExit(1) from None
    if work.keeps_inputs:
        seen = [torch.cat(tensors) for tensors in zip(*inputs, strict=True)]
        torch.save(seen, work.root / f"seen-{group.rank}.pt")
    raise SystemExit(0 if record.status == "done" else 1)


def _hurry() -> None:
    """Log often, wait briefly, and train the classifier of scores for a few steps only."""
    training_stage.LOG_EVERY = 3
    failures.POLL, failures.GRACE = 0.1, 1.0
    batches.BATCH_ON_CPU = 5
    classifiers.DIGITS = replace(classifiers.DIGITS, steps=40)


def declare(group: Group, port: int) -> None:
    """Set what a launcher sets for a rank."""
    os.environ |= {
        "RANK": str(group.rank),
        "WORLD_SIZE": str(group.world_size),
        "LOCAL_RANK": str(group.rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _arm(fault: Fault, group: Group, folder: Path) -> None:
    """Make the fault strike this process if its rank is meant."""
    update, passes = Trainer._update, Trainer._forward_backward
    factor = {FaultKind.NAN: math.nan, FaultKind.SPIKE: 1000.0}.get(fault.kind)
    is_target = group.rank == fault.rank

    # A wrong loss stays wrong; every other fault strikes at its step alone.
    def wrong(self: Trainer, *inputs: Tensor) -> Tensor:
        loss = passes(self, *inputs)
        return loss * factor if is_target and factor and self.step >= fault.step else loss

    def faulty(self: Trainer, *batch: Any) -> Tensor:
        if self.step == fault.step and is_target:
            fault.strike(folder)
        elif self.step == fault.step and fault.kind == FaultKind.RAISE_WHILE_OTHERS_HANG:
            time.sleep(2 * BOUND)
        return update(self, *batch)

    Trainer._forward_backward = wrong  # type: ignore[method-assign]
    Trainer._update = faulty  # type: ignore[method-assign]


def _keep_inputs(inputs: list[tuple[Tensor, ...]]) -> None:
    losses: Callable[..., dict[str, Tensor]] = IDDPM.losses

    def keeping(self: IDDPM, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        inputs.append(batch)
        return losses(self, model, *batch)

    IDDPM.losses = keeping  # type: ignore[method-assign, assignment]


def run_group(
    world_size: int, work: Work, member: Callable[[Group, int, Work], None] = run_member
) -> list[int]:
    """Run a group of processes, each by `member`, and return the exit statuses of its ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # The ranks run side by side.
    groups = [Group(rank, world_size, rank) for rank in range(world_size)]
    ranks = [context.Process(target=member, args=(group, port, work)) for group in groups]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(BOUND)

    # A rank that has not ended has no status.
    codes = [process.exitcode for process in ranks]
    assert None not in codes, f"a rank hangs: {codes}"
    return [code for code in codes if code is not None]


def newest_record(root: Path, stage: Stage = TRAIN) -> Record | None:
    """Return the newest record of a stage, whatever its status."""
    records = Store(root).here.by_id().get(spec_id(stage))
    return records[-1] if records else None


def finished_record(root: Path, stage: Stage = TRAIN) -> Record:
    """Return the newest record of a stage, which must be there."""
    record = newest_record(root, stage)
    assert record is not None, f"no record of {spec_id(stage)}"
    return record


def read_curve(root: Path) -> list[float]:
    """Return the losses in the log of the training."""
    lines = (root / "runs" / spec_id(TRAIN) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
