"""Faults against a training on two nodes: `python tests/fault_test.py --faults 20`. Needs slurm-wlm and munge; minutes.

A tiny training runs undisturbed in two processes, and on a cluster of its own (slurm_cluster.sh) while faults are injected
at seeded moments, each after the run has kept a checkpoint since the one before. Prints what was injected, what was survived and how
many steps were lost; exit status 0 if all were survived and the final weights are the undisturbed run's, bit for bit.

Every process writes each step that it finishes into a file, which outlives it. What an attempt has lost is the furthest
of them less the step that the next attempt starts from.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from experiments.engine.cluster import submit as engine_cluster
from experiments.engine.cluster.client import queue
from experiments.engine.cluster.site import Site
from experiments.engine.cluster.submit import Array, run_job, submit
from experiments.engine.jobs.job import Job
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train

CLUSTER = REPOSITORY / "tests" / "slurm_cluster.sh"
SITE = Site(
    nodes=2,
    gpus_per_node=0,
    cpus_per_task=1,
    time="02:00:00",
    signal_seconds=60,
    checkpoint_every=20,
)
PATIENCE = 300.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
STEPS = "FAULT_TEST_STEPS"  # environment variable: the folder of the steps that processes finish


def training(steps: int) -> Train:
    backbone = Backbone(
        "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
    )
    return Train(
        backbone,
        Data("digits", size=8, channels=1, num_classes=10),
        Recipe(steps=steps, batch=16, lr=1e-3, ema=0.99),
    )


def witnessed(job: Job, root: Path, resources: dict[str, Any]) -> None:
    """What a submitted job's processes run: first and last step of this attempt are in a file of its own at any moment."""
    from experiments.engine.training.trainer import Trainer

    steps, name = (
        Trainer.steps,
        "-".join(
            os.environ.get(f"SLURM_{part}", "0") for part in ("JOB_ID", "RESTART_COUNT", "PROCID")
        ),
    )

    def written(trainer: Trainer, *arguments: Any) -> Any:
        with open(Path(os.environ[STEPS]) / name, "wb", buffering=0) as file:
            first = trainer.step
            os.pwrite(file.fileno(), b"%12d%12d" % (first, first), 0)
            for loss in steps(trainer, *arguments):
                os.pwrite(file.fileno(), b"%12d%12d" % (first, trainer.step), 0)
                yield loss

    Trainer.steps = written
    run_job(job, root, resources)


def lost(folder: Path) -> int:
    """Steps that were made and not gone on from, over all attempts."""
    attempts = sorted(
        (tuple(map(int, path.name.split("-"))), path.read_text().split())
        for path in folder.iterdir()
    )
    ranks = [
        [tuple(map(int, steps)) for _, steps in found]
        for _, found in groupby(attempts, lambda attempt: attempt[0][:2])
    ]
    return sum(
        max(0, max(last for _, last in before) - after[0][0]) for before, after in pairwise(ranks)
    )


class Cluster:
    """The test cluster, and the one job that runs on it."""

    def __init__(self, folder: Path, root: Path, spec: Train, rng: random.Random) -> None:
        self.environment, self.root, self.rng = os.environ | {"DIR": str(folder)}, root, rng
        self.store, self.job = Store(root), Job("fault test", (spec,))
        self.checkpoints = self.store.run_dir(spec) / "checkpoints"
        self.submission = None

    def script(self, *command: str) -> str:
        return subprocess.run(
            ["bash", CLUSTER, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def send(self) -> None:
        (self.submission,) = submit([Array(SITE, (self.job,))], self.store, "fault_test.py")

    def state(self) -> str:
        with suppress(ValueError):  # the controller may be restarting
            return queue()[self.submission.job].state
        return "UNKNOWN"

    def done(self) -> bool:
        self.store.refresh()
        return self.store.here.latest(self.job.stages[0]) is not None

    def newest(self) -> int:
        """Step of the newest checkpoint."""
        return max(
            (int(path.name.split("-")[1]) for path in self.checkpoints.glob("step-*-*.pt")),
            default=0,
        )

    def ranks(self) -> list[int]:
        """Processes of the job, by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                names = dict(
                    line.split("=", 1)
                    for line in (process / "environ")
                    .read_bytes()
                    .decode(errors="replace")
                    .split("\0")
                    if "=" in line
                )
                if (
                    names.get("SLURM_JOB_ID") == self.submission.job
                    and "SLURM_PROCID" in names
                    and b"submitit" in (process / "cmdline").read_bytes()
                ):
                    found[int(names["SLURM_PROCID"])] = int(process.name)
        return [found[rank] for rank in sorted(found)]

    def values(self) -> dict[str, Any]:
        """Of the finished run's record."""
        record = self.store.here.latest(self.job.stages[0])
        return record.values if record else {}

    def until(self, what: Callable[[], bool], words: str, patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        while not what():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"not within {patience:.0f} s: {words} (the job is {self.state().lower()})"
                )
            time.sleep(0.1)


def kill_rank(cluster: Cluster) -> None:
    if ranks := cluster.ranks():
        os.kill(cluster.rng.choice(ranks), signal.SIGKILL)


def kill_step(cluster: Cluster) -> None:
    listed = subprocess.run(
        ["squeue", "--steps", "-h", "-j", cluster.submission.job, "-o", "%i"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    subprocess.run(
        ["scancel", "--signal=KILL", *re.findall(r"^\d+\.\d+$", listed.stdout, re.M)],
        check=True,
        timeout=60,
    )


def kill_node(cluster: Cluster) -> None:
    lose(cluster, "node-kill")


def kill_slurmd(cluster: Cluster) -> None:
    """Its rank lives on where the scheduler, which starts the job again, cannot end it."""
    lose(cluster, "slurmd-kill")


def lose(cluster: Cluster, how: str) -> None:
    number = cluster.rng.choice((1, 2))
    cluster.script(how, str(number))
    subprocess.run(
        ["scontrol", "update", f"nodename=127.0.0.1{number}", "state=down", "reason=fault"],
        check=True,
        timeout=60,
    )
    cluster.until(lambda: cluster.state() != "RUNNING", "the loss of a node is noticed")
    cluster.script("node-start", str(number))


def preempt(cluster: Cluster) -> None:
    """A job of a higher partition takes the nodes; its scheduler sends SIGTERM and waits for a grace time."""
    command = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 2",
    ]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


def signal_usr2(cluster: Cluster) -> None:
    subprocess.run(["scancel", "--signal=USR2", cluster.submission.job], check=True, timeout=60)


def requeue(cluster: Cluster) -> None:
    subprocess.run(["scontrol", "requeue", cluster.submission.job], check=True, timeout=60)


def restart_controller(cluster: Cluster) -> None:
    cluster.script("restart")
    cluster.until(lambda: cluster.state() != "UNKNOWN", "the controller answers")


def damage(cluster: Cluster, how: Callable[[Path], None]) -> None:
    """Kill the job's step and damage the newest checkpoint before the next attempt reads it."""
    kill_step(cluster)
    cluster.until(lambda: not cluster.ranks(), "the step ends")
    how(max(cluster.checkpoints.glob("step-*-*.pt")))


def truncate(cluster: Cluster) -> None:
    damage(cluster, lambda path: os.truncate(path, cluster.rng.randrange(path.stat().st_size)))


def flip_bit(cluster: Cluster) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[cluster.rng.randrange(len(content))] ^= 1 << cluster.rng.randrange(8)
        path.write_bytes(content)

    damage(cluster, flip)


def fill_disk(cluster: Cluster) -> None:
    """No space is left until the run has stopped with an error; then, as its owner would, free some and submit again."""
    filler = cluster.root / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    cluster.until(
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


def disturb(cluster: Cluster, faults: list[Callable[[Cluster], None]]) -> int:
    """Submit the run and inject the faults, each once the run has kept a checkpoint since the last; how many it survived."""
    cluster.send()
    for number, fault in enumerate(faults):
        reached = cluster.newest()
        try:
            cluster.until(
                lambda: cluster.newest() > reached and cluster.state() == "RUNNING",
                "the run goes on and keeps a checkpoint",
            )
            target = cluster.newest() + cluster.rng.randrange(2 * SITE.checkpoint_every)
            cluster.until(lambda: cluster.newest() >= target, f"the run comes to step {target}")
            time.sleep(cluster.rng.uniform(0, 0.5))  # a moment between two steps
            print(
                f"fault {number + 1:2}, after step {cluster.newest():5}: {fault.__name__.replace('_', ' ')}",
                flush=True,
            )
            fault(cluster)
        except TimeoutError as error:
            print(f"not survived: {error}")
            return number
    return len(faults)


def undisturbed(root: Path, steps: int) -> list[subprocess.Popen[bytes]]:
    """The same training in two processes without a cluster."""
    code = "import sys; from fault_test import *; sys.exit(bool(work_in_job(Job('', (training(int(sys.argv[2])),)), Path(sys.argv[1]), threads=1, **given(SITE))))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{REPOSITORY}:{CLUSTER.parent}",
    }
    command = [sys.executable, "-c", code, str(root), str(steps)]
    return [
        subprocess.Popen(command, env=group | {"RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument(
        "--steps",
        type=int,
        default=6000,
        help="of the training; it has to be under way as long as faults come",
    )
    args = parser.parse_args()
    if absent := [
        name
        for name in PROGRAMS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]:
        parser.error(
            f"{', '.join(absent)} not installed: apt-get install --no-install-recommends slurm-wlm munge"
        )
    rng, spec = random.Random(args.seed), training(args.steps)
    kinds = [
        fault for fault in FAULTS if fault is not fill_disk or os.geteuid() == 0
    ]  # a small disk has to be mounted
    rng.shuffle(kinds)
    faults = [kinds[number % len(kinds)] for number in range(args.faults)]
    rng.shuffle(faults)
    with tempfile.TemporaryDirectory(prefix="fault-test-") as folder, ExitStack() as stack:
        place = Path(folder)
        disk = place / "disk"
        disk.mkdir()
        if fill_disk in kinds:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", disk], check=True)
            stack.callback(subprocess.run, ["umount", "-l", disk], check=False)
        calm = undisturbed(place / "undisturbed", args.steps)
        stack.callback(lambda: [process.kill() for process in calm])
        cluster = Cluster(place / "cluster", disk, spec, rng)
        cluster.script("start")
        stack.callback(cluster.script, "stop")
        (place / "steps").mkdir()
        os.environ |= {
            "SLURM_CONF": str(place / "cluster" / "slurm.conf"),
            STEPS: str(place / "steps"),
            "PYTHONPATH": f"{REPOSITORY}:{CLUSTER.parent}",
        }
        engine_cluster.run_job = witnessed
        survived = disturb(cluster, faults)
        with suppress(TimeoutError):
            cluster.until(cluster.done, "the run ends", 4 * PATIENCE)
        for process in calm:
            process.wait()
        record = Store(place / "undisturbed").here.latest(spec)
        weights = [
            record and record.values["weights_sha256"],
            cluster.values().get("weights_sha256"),
        ]
        attempts = cluster.values().get("attempts", [])
        same = weights[0] == weights[1] is not None
        print(
            f"faults injected: {len(faults)}; survived: {survived}; attempts: {len(attempts)}; steps lost: {lost(place / 'steps')} of {args.steps}, a checkpoint every {SITE.checkpoint_every}"
        )
        print(
            f"final weights: {weights[1]}, undisturbed {weights[0]}: {'identical' if same else 'NOT identical'}"
        )
        if not same:
            print((disk / cluster.submission.log).read_text()[-3000:])
    return 0 if same and survived == len(faults) else 1


if __name__ == "__main__":
    from fault_test import main as importable  # a job finds what it runs by the name of this module

    sys.exit(importable())
