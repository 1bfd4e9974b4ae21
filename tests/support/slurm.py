"""A Slurm cluster on this machine, its clients, and a script whose jobs a test sends to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime.heartbeat import read_heartbeat
from tests.support.commands import TABLE

SCRIPT = REPOSITORY / "tests" / "slurm_cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

# The site that a test's commands know, as environment variables.
SITE = {
    "DICO_SLURM_GPUS_PER_NODE": "0",
    "DICO_SLURM_CPUS_PER_TASK": "1",
    "DICO_SLURM_CONCURRENT": "2",
    "DICO_SLURM_SIGNAL_SECONDS": "30",
    "DICO_SLURM_TIME": "1:00:00",
}


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_ABSENT = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
_ADVICE = "apt-get install --no-install-recommends slurm-wlm munge"

# The marks of a file whose tests need a cluster.
NEEDS_CLUSTER = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(_ABSENT), reason=f"{', '.join(_ABSENT)} not installed; {_ADVICE}"),
]


@dataclass(frozen=True)
class Cluster:
    """A running cluster of two virtual nodes."""

    folder: Path
    # Environment variables of its clients.
    environment: Mapping[str, str]

    def control(self, *command: str) -> None:
        """Run a command of the cluster's script, such as one that kills a node."""
        environment = os.environ | {"DIR": str(self.folder)}
        subprocess.run(["bash", SCRIPT, *command], env=environment, check=True)

    def client(self, *command: str, **variables: str) -> str:
        """Run a client such as squeue, with further variables, and return what it prints."""
        return subprocess.run(
            command,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start no job meanwhile, so that what is sent waits in the queue."""
        self.client("scontrol", "update", "PartitionName=main", "State=DOWN")
        try:
            yield
        finally:
            self.client("scontrol", "update", "PartitionName=main", "State=UP")

    def submit(self, *options: str, **variables: str) -> str:
        """Send a batch script and return the id of its job."""
        return self.client("sbatch", "--parsable", *options, **variables).strip()

    def state_of(self, job: str, *options: str) -> str:
        """Return the scheduler's state of a job in the queue; -t all finds ended jobs too."""
        return self.client("squeue", "-h", *options, "-j", job, "-o", "%T").strip()

    def restarts_of(self, job: str) -> int:
        """Return how often a job was requeued."""
        (restarts,) = re.findall(r"Restarts=(\d+)", self.client("scontrol", "show", "job", job))
        return int(restarts)

    def queued(self) -> list[str]:
        """Return the ids of the jobs in the queue."""
        return self.client("squeue", "-h", "-o", "%i").split()

    def wait_until(
        self, condition: Callable[[], bool], description: str, seconds: float = 400
    ) -> None:
        """Wait for a condition, and fail with the cluster's state if it does not come true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{description}\n{self._describe()}"
            time.sleep(0.5)

    def wait_until_empty(self) -> None:
        """Wait until no job is in the queue."""
        self.wait_until(lambda: not self.queued(), "the queue empties")

    def _describe(self) -> str:
        """Return the scheduler's jobs and the ends of its logs."""
        jobs = subprocess.run(
            ["scontrol", "show", "job"],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        # Of every log, the last forty lines.
        paragraphs = [jobs.stdout, jobs.stderr]
        for path in sorted(self.folder.glob("log/*.log")):
            lines = path.read_text(errors="replace").splitlines()
            paragraphs.append("\n".join([f"{path.name}:", *lines[-40:]]))
        return "\n".join(paragraphs)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in a new folder, and stop it at the end."""
    variables = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    cluster = Cluster(folder, os.environ | SITE | variables)
    cluster.control("start")
    yield cluster
    cluster.control("stop")


@dataclass(frozen=True)
class Command:
    """A script with one table, called with options that every call shares."""

    environment: Mapping[str, str]
    script: Path
    options: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        return self.script.parent / "results"

    def under(self, **variables: str) -> Command:
        """Return the same command under further environment variables."""
        return replace(self, environment={**self.environment, **variables})

    def call(self, *options: str, cluster: str = "slurm") -> subprocess.CompletedProcess[str]:
        """Run the script and return what it printed."""
        command = [sys.executable, str(self.script), "--table", "4"]
        command += ["--results", str(self.results), "--cluster", cluster, *self.options, *options]
        return subprocess.run(
            command,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def status(self) -> str:
        """Return what --status prints."""
        return self.call("--status").stdout

    def send(self) -> dict[str, str]:
        """Submit the trainings and return the ids of their jobs by the rows' labels."""
        sent = self.call()
        assert sent.returncode == 0, sent.stderr
        lines = re.findall(r"^submitted job (\w+): (\w+), seed 0$", sent.stdout, re.M)
        return {label: job for job, label in lines}

    def count_training(self, step: str = r"\d") -> int:
        """Count the runs whose step begins with a digit: [1-9] asks for a first step."""
        return len(re.findall(rf"running +training, step {step}", self.status()))

    def attempts(self) -> list[list[dict[str, Any]]]:
        """Return the attempts of every run."""
        paths = self.results.glob("runs/*/attempts.json")
        return [json.loads(path.read_text()) for path in paths]

    def counts_of_attempts(self) -> list[int]:
        """Return how often every run was begun, least often first."""
        return sorted(len(attempts) for attempts in self.attempts())

    def run_folder(self) -> Path:
        """Return the folder of the only run."""
        (path,) = self.results.glob("runs/*/attempts.json")
        return path.parent

    def reached_step(self) -> int:
        """Return the step in the heartbeat of the only run, or 0 before its first."""
        heartbeat = read_heartbeat(self.run_folder()) or {}
        return heartbeat.get("step") or 0

    def records(self) -> set[tuple[str, str]]:
        """Return id and status of every record but counts."""
        records = [json.loads(path.read_text()) for path in self.results.glob("records/*/*.json")]
        return {(record["id"], record["status"]) for record in records if record["kind"] != "cost"}


def write_table(cluster: Cluster, folder: Path, steps: int, *rows: str) -> Command:
    """Write the script with a table of three small rows, of which a call runs some or all."""
    script = folder / "tiny.py"
    script.write_text(TABLE.format(steps=steps))
    options = ("--rows", *rows) if rows else ()
    return Command(cluster.environment, script, options)


def training_states(status: str) -> dict[str, str]:
    """Return the states of trainings by label, from what --status printed."""
    return dict(re.findall(r"train +(\w+), seed 0 +(\w+)", status))
