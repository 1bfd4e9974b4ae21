"""The run and the cluster of the fault test, and the faults that strike them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from experiments.engine.cluster.client import Submission, queue
from experiments.engine.cluster.site import Site
from experiments.engine.cluster.submit import Array, run_job, submit
from experiments.engine.jobs.job import Job
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Recipe, Train
from tests.support.trainings import DICO, DIGITS

SCRIPT = REPOSITORY / "tests" / "slurm_cluster.sh"
SITE = Site(
    nodes=2,
    gpus_per_node=0,
    cpus_per_task=1,
    time="02:00:00",
    signal_seconds=60,
    checkpoint_every=20,
)
PATIENCE = 300.0  # seconds for anything that a fault sets off
STEPS = "FAULT_TEST_STEPS"  # environment variable: folder of the steps that processes finish


def training(steps: int) -> Train:
    """Return a tiny training of so many steps."""
    return Train(DICO, DIGITS, Recipe(steps=steps, batch=16, lr=1e-3, ema=0.99))


def run_witnessed(job: Job, root: Path, resources: dict[str, Any], code: str) -> None:
    """Run a job in one of its processes, and keep its first and last step in a file.

    The file is of this attempt and rank, and right at any moment.
    """
    from experiments.engine.training.trainer import Trainer

    steps = Trainer.steps
    variables = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID")
    name = "-".join(os.environ.get(variable, "0") for variable in variables)

    # One write of fixed length replaces both numbers.
    def witnessed(trainer: Trainer, *arguments: Any) -> Any:
        with open(Path(os.environ[STEPS]) / name, "wb", buffering=0) as file:
            first = trainer.step
            os.pwrite(file.fileno(), b"%12d%12d" % (first, first), 0)
            for loss in steps(trainer, *arguments):
                os.pwrite(file.fileno(), b"%12d%12d" % (first, trainer.step), 0)
                yield loss

    Trainer.steps = witnessed  # type: ignore[method-assign, assignment]
    run_job(job, root, resources, code)


def count_lost_steps(folder: Path) -> int:
    """Count the steps that were made and not kept, over all attempts.

    An attempt loses its furthest step less the step that the next attempt starts from.
    """
    # A file is named job-restart-rank, and holds first and last step.
    files = []
    for path in folder.iterdir():
        key = tuple(int(part) for part in path.name.split("-"))
        first, last = path.read_text().split()
        files.append((key, (int(first), int(last))))

    attempts = []
    for _, ranks in groupby(sorted(files), lambda file: file[0][:2]):
        attempts.append([steps for _, steps in ranks])

    lost = 0
    for before, after in pairwise(attempts):
        furthest = max(last for _, last in before)
        start, _ = after[0]
        lost += max(0, furthest - start)
    return lost


class Cluster:
    """The test cluster, and the one job that runs on it."""

    def __init__(self, folder: Path, root: Path, spec: Train, rng: random.Random) -> None:
        self.environment = os.environ | {"DIR": str(folder)}
        self.root = root
        self.rng = rng
        self.store = Store(root)
        self.job = Job("fault test", (spec,))
        self.checkpoints = self.store.run_dir(spec) / "checkpoints"
        self._submission: Submission | None = None

    @property
    def submission(self) -> Submission:
        """The job in the queue."""
        assert self._submission is not None, "nothing was submitted"
        return self._submission

    def script(self, *command: str) -> None:
        """Run a command of the cluster's script."""
        subprocess.run(
            ["bash", SCRIPT, *command], env=self.environment, capture_output=True, check=True
        )

    def send(self) -> None:
        """Submit the job."""
        (self._submission,) = submit([Array(SITE, (self.job,))], self.store, "fault_test.py")

    def state(self) -> str:
        """Return the scheduler's state of the job. The controller may be restarting."""
        with suppress(ValueError):
            return queue()[self.submission.job].state
        return "UNKNOWN"

    def done(self) -> bool:
        """Return whether the run has a record."""
        self.store.refresh()
        return self.store.here.latest(self.job.stages[0]) is not None

    def newest(self) -> int:
        """Return the step of the newest checkpoint."""
        names = [path.name for path in self.checkpoints.glob("step-*-*.pt")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def ranks(self) -> list[int]:
        """Return the ids of the job's processes, by rank."""
        ranks: dict[int, int] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                rank = self._rank_of(process)
                if rank is not None:
                    ranks[rank] = int(process.name)
        return [ranks[rank] for rank in sorted(ranks)]

    def _rank_of(self, process: Path) -> int | None:
        """Return a process's rank in the job, or None if it is another process."""
        text = (process / "environ").read_bytes().decode(errors="replace")
        pairs = [line.split("=", 1) for line in text.split("\0") if "=" in line]
        variables = dict(pairs)
        is_of_job = variables.get("SLURM_JOB_ID") == self.submission.job
        if not is_of_job or "SLURM_PROCID" not in variables:
            return None
        if b"submitit" not in (process / "cmdline").read_bytes():
            return None
        return int(variables["SLURM_PROCID"])

    def values(self) -> dict[str, Any]:
        """Return the values of the finished run's record."""
        record = self.store.here.latest(self.job.stages[0])
        return record.values if record else {}

    def wait_until(
        self, condition: Callable[[], bool], description: str, patience: float = PATIENCE
    ) -> None:
        """Wait for a condition. Raise TimeoutError if it does not come true."""
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                state = self.state().lower()
                raise TimeoutError(
                    f"not within {patience:.0f} s: {description} (the job is {state})"
                )
            time.sleep(0.1)


def _client(*command: str) -> str:
    """Run a command of the scheduler and return what it prints."""
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


def kill_rank(cluster: Cluster) -> None:
    ranks = cluster.ranks()
    if ranks:
        os.kill(cluster.rng.choice(ranks), signal.SIGKILL)


def kill_step(cluster: Cluster) -> None:
    listed = _client("squeue", "--steps", "-h", "-j", cluster.submission.job, "-o", "%i")
    steps = re.findall(r"^\d+\.\d+$", listed, re.M)
    _client("scancel", "--signal=KILL", *steps)


def kill_node(cluster: Cluster) -> None:
    _lose_node(cluster, "node-kill")


def kill_slurmd(cluster: Cluster) -> None:
    """Kill a node's daemon. Its rank lives on, as the scheduler cannot end it."""
    _lose_node(cluster, "slurmd-kill")


def _lose_node(cluster: Cluster, command: str) -> None:
    number = cluster.rng.choice((1, 2))
    cluster.script(command, str(number))
    node = f"nodename=127.0.0.1{number}"
    _client("scontrol", "update", node, "state=down", "reason=fault")
    cluster.wait_until(lambda: cluster.state() != "RUNNING", "the loss of a node is noticed")
    cluster.script("node-start", str(number))


def preempt(cluster: Cluster) -> None:
    """Let a job of a higher partition take the nodes.

    The scheduler sends SIGTERM to the job, and waits for a grace time.
    """
    options = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    _client("sbatch", *options, "--wrap", "sleep 2")


def signal_usr2(cluster: Cluster) -> None:
    _client("scancel", "--signal=USR2", cluster.submission.job)


def requeue(cluster: Cluster) -> None:
    _client("scontrol", "requeue", cluster.submission.job)


def restart_controller(cluster: Cluster) -> None:
    cluster.script("restart")
    cluster.wait_until(lambda: cluster.state() != "UNKNOWN", "the controller answers")


def _damage(cluster: Cluster, how: Callable[[Path], None]) -> None:
    """Kill the job's step, and damage the newest checkpoint before the next attempt reads it."""
    kill_step(cluster)
    cluster.wait_until(lambda: not cluster.ranks(), "the step ends")
    how(max(cluster.checkpoints.glob("step-*-*.pt")))


def truncate(cluster: Cluster) -> None:
    _damage(cluster, lambda path: os.truncate(path, cluster.rng.randrange(path.stat().st_size)))


def flip_bit(cluster: Cluster) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[cluster.rng.randrange(len(content))] ^= 1 << cluster.rng.randrange(8)
        path.write_bytes(content)

    _damage(cluster, flip)


def fill_disk(cluster: Cluster) -> None:
    """Leave no space until the run has stopped with an error.

    Then free some and submit again, as the run's owner would.
    """
    filler = cluster.root / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    cluster.wait_until(
        lambda: cluster.state() in ("FAILED", "COMPLETED"), "the run stops on a full disk"
    )
    filler.unlink()
    cluster.send()


FAULTS = (
    kill_rank,
    kill_step,
    kill_node,
    kill_slurmd,
    preempt,
    signal_usr2,
    requeue,
    restart_controller,
    truncate,
    flip_bit,
    fill_disk,
)


def inject(cluster: Cluster, faults: list[Callable[[Cluster], None]]) -> int:
    """Submit the run and inject the faults. Return how many of them the run survived.

    Each comes after the run has kept a checkpoint since the fault before.
    """
    cluster.send()
    for number, fault in enumerate(faults):
        # A run that does not go on has not survived the fault before.
        try:
            _wait_for_progress(cluster)
            name = fault.__name__.replace("_", " ")
            print(f"fault {number + 1:2}, after step {cluster.newest():5}: {name}", flush=True)
            fault(cluster)
        except TimeoutError as error:
            print(f"not survived: {error}")
            return number
    return len(faults)


def _wait_for_progress(cluster: Cluster) -> None:
    """Wait for a new checkpoint, then for a random moment after it."""
    reached = cluster.newest()
    cluster.wait_until(
        lambda: cluster.newest() > reached and cluster.state() == "RUNNING",
        "the run goes on and keeps a checkpoint",
    )
    target = cluster.newest() + cluster.rng.randrange(2 * SITE.checkpoint_every)
    cluster.wait_until(lambda: cluster.newest() >= target, f"the run comes to step {target}")

    # A moment between two steps.
    time.sleep(cluster.rng.uniform(0, 0.5))
