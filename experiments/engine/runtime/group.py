"""The processes of a job as one group: NCCL between GPUs, gloo between CPUs.

There is one process per GPU. Ranks come from the environment: a launcher's variables (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) or those of a scheduler's step (SLURM_PROCID,
SLURM_STEP_NUM_TASKS, SLURM_LOCALID). Every wait for another process is bounded. Variables that
torchrun or srun did not set may be left over from something else: whom they name has a minute to
come.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.engine.machine.environment import read_number, read_variable
from experiments.engine.machine.lifetime import LAUNCHED
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.code import own_code, require_same_code
from experiments.engine.runtime import preemption

# Seconds after which a process says for whom it waits.
SAID_AFTER = 3.0
# Seconds that others have to come, whom no launcher starts.
COMING = 60.0


@dataclass(frozen=True)
class Group:
    """This process's place among those that share a run.

    With one process, every method returns what it was given.
    """

    # This process's number, from 0.
    rank: int = 0
    # How many processes there are.
    world_size: int = 1
    # This process's number on its node.
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which writes records."""
        return self.rank == 0

    def shard(self, num: int) -> slice:
        """Return this rank's share of a batch.

        Args:
            num: Samples in the whole batch.

        Raises:
            ValueError: The processes do not divide the batch evenly.
        """
        if num % self.world_size:
            raise ValueError(
                f"{self.world_size} processes do not divide a batch of {num}; "
                "choose a number of processes that does"
            )
        size = num // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, device=torch.device("cpu"))
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over the ranks, elementwise and in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, value: int) -> int:
        """Return the largest value on any rank."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def agrees_on(self, text: str) -> bool:
        """Return whether every rank holds the same text."""
        number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        return self.maximum(number) == -self.maximum(-number)


ALONE = Group()

# How a process is no rank, by the variables that make it one.
_ADVICE = {
    ("RANK", "WORLD_SIZE"): "unset RANK and WORLD_SIZE to run one process alone",
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"): "unset SLURM_STEP_ID to run one process alone",
}


class DelayedMaximum:
    """The largest value over the ranks, one call late.

    The values of a call travel while the ranks work, and the next call returns their maximum. So
    no step waits for the network. One process gets its own value at once.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, value: int) -> int:
        if self.group.world_size == 1:
            return value
        previous = self._pending
        shared = torch.tensor(value)
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, async_op=True)
        self._pending = work, shared
        if previous is None:
            return 0
        work, shared = previous
        work.wait()
        return int(shared)


def average_gradients(model: nn.Module, static: bool) -> DistributedDataParallel:
    """Wrap a network so that its gradients are averaged over the ranks during backward.

    Args:
        model: Its buffers are constants, and are not exchanged.
        static: Whether every step runs the same graph. Parameters may then stay unused. PyTorch
            excludes this together with gradient accumulation or compilation.
    """
    # Newer versions of PyTorch rename broadcast_buffers; older ones know no other name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=static
        )


def group_from_environment(environment: Mapping[str, str]) -> Group:
    """Return the rank, world size and local rank that the environment declares.

    A scheduler's count is that of the step, not of the job: an interactive shell inside an
    allocation is a step of one process.
    """
    # A launcher such as torchrun speaks first, because it may run inside a step of Slurm.
    launched = read_number("RANK", environment)
    world_size = read_number("WORLD_SIZE", environment)
    if launched is not None and world_size is not None:
        return Group(launched, world_size, read_number("LOCAL_RANK", environment) or 0)

    scheduled = read_number("SLURM_PROCID", environment)
    if scheduled is not None and read_variable("SLURM_STEP_ID", environment):
        return Group(
            scheduled,
            read_number("SLURM_STEP_NUM_TASKS", environment) or 1,
            read_number("SLURM_LOCALID", environment) or 0,
        )
    return ALONE


def master_port(job: str, step: str, restart: str) -> int:
    """Return a port in 20000-29999 for a step of a job.

    It lies below the ephemeral range, and differs after a requeue: the old port may still be held.
    """
    digest = hashlib.sha256(f"{job}.{step}.{restart}".encode()).hexdigest()
    return 20000 + int(digest, 16) % 10000


def join_group(device: str, seconds: float) -> Group:
    """Enter the group that the environment declares, once per process.

    Args:
        device: "cpu" or "cuda".
        seconds: How long a collective operation may wait, and at most how long the first one.

    Raises:
        ValueError: The environment declares several processes, but not where they meet.
        SystemExit: The other processes cannot be reached; the status asks for a restart, which
            takes another port.
        ValueError: This rank or another runs other code than rank 0 does.
    """
    group = group_from_environment(os.environ)
    if group.world_size > 1 and not dist.is_initialized():
        _connect(group, device, seconds)
        _require_one_code(group)
    return group


def _require_one_code(group: Group) -> None:
    """Raise ValueError on every rank unless all run rank 0's code, so that none waits for others.

    The ranks that differ say so; the others say that another rank does.
    """
    own = own_code()
    first = group.broadcast(own)
    if group.maximum(int(own.digests != first.digests)):
        require_same_code(first)
        raise ValueError(
            "another rank imports other code than this one; start all ranks from the same tree "
            "and study, and do not edit them meanwhile"
        )


def _connect(group: Group, device: str, seconds: float) -> None:
    if device == "cuda":
        torch.cuda.set_device(group.local_rank % torch.cuda.device_count())

    # The ranks meet at the first host; a rank that finds no other ends with a code of its own.
    try:
        _name_master(group)
        with _saying_for_whom(group):
            patience = timedelta(seconds=_bound_of_coming(seconds))
            meeting = dist.rendezvous("env://", group.rank, group.world_size, timeout=patience)
            store, _, _ = next(meeting)
        store.set_timeout(timedelta(seconds=seconds))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=group.rank,
            world_size=group.world_size,
            timeout=timedelta(seconds=seconds),
        )
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        address = read_variable("MASTER_ADDR") or "the first host"
        port = read_variable("MASTER_PORT") or ""
        print(
            f"error: rank {group.rank} cannot join the others at {address}:{port}: "
            f"{one_line(error).rstrip('.')}; {_ADVICE[_rank_variables()]}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(preemption.LOST) from None

    atexit.register(dist.destroy_process_group)


def _rank_variables() -> tuple[str, str]:
    """Return the variables that make this process a rank of several."""
    names = ("RANK", "WORLD_SIZE")
    if any(read_number(name) is None for name in names):
        return ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return names


def _bound_of_coming(seconds: float) -> float:
    """Return how long the others may take to come.

    Those that torchrun or srun starts end with their launcher, and a cold disk may make them late.
    """
    if read_variable(LAUNCHED) or read_variable("SLURM_STEP_ID"):
        return seconds
    return min(COMING, seconds)


@contextmanager
def _saying_for_whom(group: Group) -> Iterator[None]:
    """Say on standard error for whom this process waits, if they do not come at once."""
    address = f"{read_variable('MASTER_ADDR')}:{read_variable('MASTER_PORT')}"
    names = _rank_variables()
    text = (
        f"rank {group.rank} of {group.world_size} ({', '.join(names)}) waits for the others at "
        f"{address} (MASTER_ADDR, MASTER_PORT); {_ADVICE[names]}"
    )
    timer = threading.Timer(SAID_AFTER, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _name_master(group: Group) -> None:
    """Set where rank 0 listens, unless a launcher says it: the first host of the step."""
    if read_variable("MASTER_ADDR") is None:
        hosts = read_variable("SLURM_STEP_NODELIST") or read_variable("SLURM_JOB_NODELIST")
        if hosts is None:
            names = _rank_variables()
            raise ValueError(
                f"the environment makes this process rank {group.rank} of {group.world_size} "
                f"({', '.join(names)}) without MASTER_ADDR, the address of rank 0; set it, or "
                f"{_ADVICE[names]}"
            )
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]

    # The port follows from the job, the step and the restart, so that two jobs do not collide.
    if read_variable("MASTER_PORT") is None:
        job = read_variable("SLURM_JOB_ID") or "0"
        step = read_variable("SLURM_STEP_ID") or "0"
        restart = read_variable("SLURM_RESTART_COUNT") or "0"
        os.environ["MASTER_PORT"] = str(master_port(job, step, restart))


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{type(error).__name__}: {explain(error)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
