"""Faults against a training on two nodes: `python tests/fault_test.py --faults 20`.

A tiny training runs undisturbed in two processes. The same training runs on a cluster of its own
(slurm_cluster.sh) while faults are injected at seeded moments. The test prints what was injected,
what was survived and how many steps were lost. The exit status is 0 if the run survived all
faults and its final weights are the undisturbed run's, bit for bit.

It needs slurm-wlm and munge, and takes minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # so that this script finds the helpers of the tests

from experiments.engine.cluster import submit  # noqa: E402
from experiments.engine.records.store import Store  # noqa: E402
from experiments.engine.specs.spec import Train  # noqa: E402
from tests.support.faults import (  # noqa: E402
    FAULTS,
    PATIENCE,
    SITE,
    STEPS,
    Cluster,
    count_lost_steps,
    fill_disk,
    inject,
    run_witnessed,
    training,
)

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
UNDISTURBED = """
import sys
from pathlib import Path
from experiments.engine.cluster.submit import trainer_resources
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.scheduled import work_in_job
from tests.support.faults import SITE, training

root, steps = Path(sys.argv[1]), int(sys.argv[2])
job = Job("", (training(steps),))
sys.exit(bool(work_in_job(job, root, threads=1, **trainer_resources(SITE))))
"""


def start_undisturbed(root: Path, steps: int) -> list[subprocess.Popen[bytes]]:
    """Start the same training in two processes without a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # As a launcher sets it for two ranks.
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", UNDISTURBED, str(root), str(steps)]
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20, help="how many (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of kinds and moments of the faults (default: 0)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6000,
        help="of the training, which must still run when the last fault comes (default: 6000)",
    )
    args = parser.parse_args()

    # Daemons lie where a user's path does not lead.
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        advice = "apt-get install --no-install-recommends slurm-wlm munge"
        parser.error(f"{', '.join(absent)} not installed: {advice}")
    return args


def choose_faults(num: int, rng: random.Random) -> list[Callable[[Cluster], None]]:
    """Return so many faults in a random order, each kind as often as the others."""
    # Only root can mount the small disk that is filled.
    kinds: list[Callable[[Cluster], None]] = [
        fault for fault in FAULTS if fault is not fill_disk or os.geteuid() == 0
    ]
    rng.shuffle(kinds)
    faults = [kinds[number % len(kinds)] for number in range(num)]
    rng.shuffle(faults)
    return faults


def start_cluster(place: Path, spec: Train, rng: random.Random, stack: ExitStack) -> Cluster:
    """Start the cluster, whose results folder is on a small disk if this user may mount one."""
    disk = place / "disk"
    disk.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", disk], check=True)
        stack.callback(subprocess.run, ["umount", "-l", disk], check=False)
    cluster = Cluster(place / "cluster", disk, spec, rng)
    cluster.script("start")
    stack.callback(cluster.script, "stop")

    # Every process of the job writes its steps to a file, which outlives it.
    (place / "steps").mkdir()
    os.environ |= {
        "SLURM_CONF": str(place / "cluster" / "slurm.conf"),
        STEPS: str(place / "steps"),
        "PYTHONPATH": str(REPOSITORY),
    }
    submit.run_job = run_witnessed
    return cluster


def main() -> int:
    args = parse_options()
    rng = random.Random(args.seed)
    spec = training(args.steps)
    faults = choose_faults(args.faults, rng)

    # The undisturbed training runs beside the cluster.
    with tempfile.TemporaryDirectory(prefix="fault-test-") as folder, ExitStack() as stack:
        place = Path(folder)
        calm = start_undisturbed(place / "undisturbed", args.steps)
        for process in calm:
            stack.callback(process.kill)
        cluster = start_cluster(place, spec, rng, stack)

        # The run has time to end, whatever it went through.
        survived = inject(cluster, faults)
        with suppress(TimeoutError):
            cluster.wait_until(cluster.done, "the run ends", 4 * PATIENCE)
        for process in calm:
            process.wait()
        return report(cluster, place, spec, len(faults), survived)


def report(cluster: Cluster, place: Path, spec: Train, num_faults: int, survived: int) -> int:
    """Print what became of the run, and return the exit status."""
    lost = count_lost_steps(place / "steps")
    attempts = cluster.values().get("attempts", [])
    print(
        f"faults injected: {num_faults}; survived: {survived}; attempts: {len(attempts)}; "
        f"steps lost: {lost} of {spec.recipe.steps}, a checkpoint every {SITE.checkpoint_every}"
    )

    # The verdict is that of the final weights.
    undisturbed = Store(place / "undisturbed").here.latest(spec)
    expected = undisturbed.values["weights_sha256"] if undisturbed else None
    weights = cluster.values().get("weights_sha256")
    is_same = expected is not None and weights == expected
    verdict = "identical" if is_same else "NOT identical"
    print(f"final weights: {weights}, undisturbed {expected}: {verdict}")
    if not is_same:
        print(Path(cluster.root, cluster.submission.log).read_text()[-3000:])
    return 0 if is_same and survived == num_faults else 1


if __name__ == "__main__":
    raise SystemExit(main())
