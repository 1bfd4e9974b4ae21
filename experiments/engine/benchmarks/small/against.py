"""Train small networks in this tree and in another one, in turn, so that drift cancels."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.engine.benchmarks.spec import SmallTrainings
from experiments.engine.machine.lifetime import bound
from experiments.engine.numerics.device import describe_device
from experiments.engine.numerics.precision import read_tf32_flags
from experiments.engine.records.store import Store, provenance
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.form import Spec
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Train
from experiments.engine.specs.stages import Protocol, train_stage
from experiments.engine.timing.clock import half_interquartile_range

WORKER = Path(__file__).with_name("worker.py")
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Rounds:
    """How often both trees train in turn."""

    number: int
    # Steps of each tree in a round.
    steps: int


class Worker:
    """A process that trains one network in one tree, in one thread."""

    def __init__(self, tree: Path, training: Train) -> None:
        """Start the training, and warm it up.

        Raises:
            ValueError: the tree cannot train the network.
        """
        self.tree = tree
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            bound([sys.executable, str(WORKER), str(tree)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        wanted = {
            "name": training.backbone.name,
            "options": training.backbone.options,
            "data": asdict(training.data),
            "recipe": asdict(training.recipe),
        }
        self._send(json.dumps(wanted))
        self.train(WARM_UP_STEPS)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        assert self.process.stdin
        self.process.kill()
        self.process.communicate()

    def train(self, steps: int) -> dict[str, float]:
        """Train some steps, and return their CPU seconds and the last loss."""
        assert self.process.stdout
        self._send(str(steps))
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(
                f"{self.tree} does not train: give a checkout of this suite, "
                "of commit ae474e9 or later"
            )
        return json.loads(line)

    def _send(self, line: str) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells that the process has ended


def measure_small(
    rows: Sequence[Row], protocol: Protocol, tree: Path, rounds: Rounds, store: Store
) -> None:
    """Compare the trainings of rows with those of another tree, print and record the ratios.

    Raises:
        ValueError: the other tree is no checkout of this suite.
    """
    data, batch = protocol.data, protocol.recipe.batch
    labels = tuple(row.label for row in rows)
    spec = SmallTrainings(find_commit(tree), data.size, data.channels, batch, labels)

    # Every row has two processes, which take turns.
    measured = {}
    for row in rows:
        values = compare(train_stage(row, protocol, 0), tree, rounds)
        measured[row.label] = values
        print(
            f"{data.size}x{data.size}x{data.channels} {row.label}: "
            f"{values['samples_per_core_s']:.0f} samples per core-second, "
            f"ratio {values['ratio']:.3f} ±{values['spread']:.3f}",
            flush=True,
        )

    append_ratios(spec, measured, rounds, store)


def append_ratios(
    spec: Spec, measured: dict[str, dict[str, float]], rounds: Rounds, store: Store
) -> None:
    """Print the mean, least and most ratio of rows measured in one thread, and record all.

    Args:
        spec: of the record.
        measured: by a row's label, its values, `ratio` among them.
        rounds: of the measurement.
        store: takes the record.
    """
    ratios = [values["ratio"] for values in measured.values()]
    mean, least, most = statistics.geometric_mean(ratios), min(ratios), max(ratios)
    print(f"geometric mean {mean:.3f}, least {least:.3f}, most {most:.3f}", flush=True)
    values = {
        "rows": measured,
        "steps": rounds.steps,
        "rounds": rounds.number,
        "geometric_mean": mean,
        "least": least,
        "most": most,
    }
    about = provenance() | describe_device("cpu") | {"threads": 1}
    about["precision_flags"] = read_tf32_flags()
    store.append(spec, "done", values, about)


def compare(training: Train, tree: Path, rounds: Rounds) -> dict[str, float]:
    """Train in both trees in turn; return rates, their ratio by round, and both last losses."""
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(REPOSITORY, training))
        other = stack.enter_context(Worker(tree, training))

        # The order alternates, so that neither tree profits from its place.
        seconds: list[tuple[float, float]] = []
        for i in range(rounds.number):
            turns = (ours, other) if i % 2 else (other, ours)
            answers = {worker: worker.train(rounds.steps) for worker in turns}
            seconds.append((answers[ours]["seconds"], answers[other]["seconds"]))

    samples = rounds.steps * training.recipe.batch
    ratios = [theirs / own for own, theirs in seconds]
    return {
        "samples_per_core_s": samples / statistics.median(own for own, _ in seconds),
        "against_samples_per_core_s": samples / statistics.median(other for _, other in seconds),
        "ratio": statistics.median(ratios),
        "spread": half_interquartile_range(ratios),
        "loss": answers[ours]["loss"],
        "against_loss": answers[other]["loss"],
    }


def find_commit(tree: Path) -> str:
    """Return the commit of a clean checkout.

    Raises:
        ValueError: git knows no commit there, or files have changed since.
    """
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        done = subprocess.run(["git", "-C", str(tree), *command], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{tree} is no checkout of this suite: make one by git worktree add")
        answers.append(done.stdout.strip())
    commit, changes = answers
    if changes:
        raise ValueError(f"{tree} differs from its commit; restore its files first")
    return commit
