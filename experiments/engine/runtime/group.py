"""The processes of a job as one group: NCCL between GPUs, gloo between CPUs; every wait is bounded.

One process a GPU. Ranks come from the environment: the scheduler's (a step's SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID)
or a launcher's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.engine.records.files import written_whole
from experiments.engine.runtime import preemption

POLL, GRACE = (
    1.0,
    10.0,
)  # seconds between looks at the other ranks' errors, and from an error to the end of this process


@dataclass(frozen=True)
class Group:
    """This process's place among those that work on a run; with one process every method is the identity."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, num: int) -> slice:
        """This rank's share of `num` samples; ValueError where they do not divide evenly."""
        if num % self.world_size:
            raise ValueError(
                f"{self.world_size} processes do not divide a batch of {num}; take a number of processes that does"
            )
        size = num // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, device=torch.device("cpu"))
        return holder[0]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def highest(self, value: int) -> int:
        """The largest value on any rank."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def equal(self, value: str) -> bool:
        """Whether every rank holds the same text."""
        number = int(hashlib.sha256(value.encode()).hexdigest()[:15], 16)
        return self.highest(number) == -self.highest(-number)


class DelayedMaximum:
    """The largest value that any rank gave at the call before, on every rank: what is said now travels while they work."""

    def __init__(self, group: Group) -> None:
        self.group, self._under_way = group, None

    def __call__(self, value: int) -> int:
        if self.group.world_size == 1:
            return value
        before, shared = self._under_way, torch.tensor(value)
        self._under_way = dist.all_reduce(shared, dist.ReduceOp.MAX, async_op=True), shared
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])


def average_gradients(model: nn.Module, static: bool) -> DistributedDataParallel:
    """The network with its gradients averaged over the ranks while the backward pass runs; its buffers are constants and stay.

    A graph declared `static` may leave parameters unused; PyTorch excludes that with accumulation and compilation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # newer versions rename broadcast_buffers, older ones know no other name
        return DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=static
        )


ALONE = Group()
_joined: Group | None = None
_broken = False


def group_from_environment(environment: Mapping[str, str]) -> Group:
    """Rank, world size and local rank that the environment declares. A scheduler's count is the step's, not the job's: an interactive shell is a step of one."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Group(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", "0")),
        )
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return Group(
            int(environment["SLURM_PROCID"]),
            int(environment.get("SLURM_STEP_NUM_TASKS", "1")),
            int(environment.get("SLURM_LOCALID", "0")),
        )
    return ALONE


def master_port(job: str, step: str, restart: str) -> int:
    """A port in 20000-29999, below the ephemeral range, that differs after a requeue: the old one may still be held."""
    return 20000 + int(hashlib.sha256(f"{job}.{step}.{restart}".encode()).hexdigest(), 16) % 10000


def join_group(device: str, seconds: float) -> Group:
    """Enter the group that the environment declares, once a process; no collective waits longer than `seconds`.

    Where the others cannot be reached (a port in use, a host without an address) one line says so and SystemExit asks for
    a restart, which takes another port.
    """
    global _joined
    if _broken:
        raise SystemExit(1)  # an earlier stage took a rank with it
    if _joined is None:
        group = group_from_environment(os.environ)
        if group.world_size > 1:
            if device == "cuda":
                torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            try:
                _name_master()
                dist.init_process_group(
                    backend,
                    rank=group.rank,
                    world_size=group.world_size,
                    timeout=timedelta(seconds=seconds),
                )
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                print(
                    f"error: rank {group.rank} cannot join the others at {_master()}: {one_line(error)}",
                    file=sys.stderr,
                    flush=True,
                )
                raise SystemExit(preemption.LOST) from None
            atexit.register(dist.destroy_process_group)
        _joined = group
    return _joined


def _name_master() -> None:
    """Agree on where rank 0 listens: what a launcher says, else the first host of the scheduler's step."""
    if "MASTER_ADDR" not in os.environ:
        hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
    if "MASTER_PORT" not in os.environ:
        job, step, restart = (
            os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
        )
        os.environ["MASTER_PORT"] = str(master_port(job, step, restart))


def _master() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'the first host')}:{os.environ.get('MASTER_PORT', '')}"


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def clear_errors(folder: Path) -> None:
    """Rank 0, before any other rank works in the folder: forget the errors of earlier attempts."""
    for path in folder.glob("rank-*.error"):
        path.unlink()


def report_error(folder: Path, group: Group, error: str) -> None:
    """In a group, leave this rank's error where the others look: `rank-<k>.error`."""
    if group.world_size > 1:
        with suppress(OSError), written_whole(folder / f"rank-{group.rank}.error") as file:
            file.write(json.dumps({"rank": group.rank, "error": error, "at": time.time()}).encode())


def first_error(folder: Path) -> dict[str, Any] | None:
    """The earliest error that a rank reported: the later ones follow from it."""
    found = []
    for path in folder.glob("rank-*.error"):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_bytes()))
    return min(found, key=lambda entry: entry["at"], default=None)


class RankLost(Exception):
    """A rank ended without a word: killed, or on a node that died. No result of the stage, which another attempt can finish."""


def explain_failure(folder: Path, group: Group, failure: Exception) -> str:
    """Why the run fails, in one line: this rank's error, or the one on another rank that it follows from.

    A rank leaves its error before its connections close, so what breaks only because of that finds it. Raises Lost where
    the others broke off and none left an error.
    """
    global _broken
    if group.world_size == 1:
        return one_line(failure)
    _broken = True
    follows = isinstance(failure, dist.DistError) or (
        isinstance(failure, RuntimeError)
        and any(word in str(failure).lower() for word in ("gloo", "nccl"))
    )
    if not follows:
        report_error(folder, group, one_line(failure))
    end = time.monotonic() + GRACE
    while (found := first_error(folder)) is None and follows and time.monotonic() < end:
        time.sleep(0.1)
    if found is None and follows:
        words = re.sub(r"\[\S*\.cc:\d+\] ", "", str(failure)).partition(". ")[0].splitlines()[0]
        raise RankLost(f"rank {group.rank} lost another rank ({words})")
    return (
        f"rank {found['rank']}: {found['error']}"
        if found
        else f"rank {group.rank}: {one_line(failure)}"
    )


class FailureWatch:
    """Looks for other ranks' errors while this rank works, and ends it: one that waits in a collective cannot notice.

    `tell(error)` is called before. A rank whose own work ends first is left alone; the first rank, which tells, goes first.
    """

    def __init__(
        self, group: Group, folder: Path, tell: Callable[[str], object] = lambda error: None
    ) -> None:
        self.group, self.folder, self.tell = group, folder, tell
        self._over = threading.Event()

    def __enter__(self) -> FailureWatch:
        if self.group.world_size > 1:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        grace = GRACE if self.group.first else 2 * GRACE
        while not self._over.wait(POLL):
            if (error := first_error(self.folder)) and not self._over.wait(grace):
                self.tell(f"rank {error['rank']}: {error['error']}")
                os._exit(1)
