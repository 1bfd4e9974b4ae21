"""Rehearse the GPU session in small, on a CPU that stands in for a GPU.

    python -m tests.support.rehearsal [--full-card] ARGUMENTS [--then ARGUMENTS]

runs `experiments/benchmark.py` once or twice. Networks, inputs and tables are small, and clocks
have no patience. Parts of the session are processes, forked from this one so that each has the
stand-in. Tests of kernels are collected, and not run. With --full-card, DiCo-XL runs out of memory
when it trains in TF32.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import backbones
from experiments import ablation, main_results
from experiments.declared import benchmarks, speed_claims, timings
from experiments.engine.benchmarks import kernel_cases, kernels, neighbours, session, steps
from experiments.engine.jobs import pool
from experiments.engine.machine.lifetime import bound
from experiments.engine.reporting.efficiency.counts import System
from experiments.engine.specs import stages
from experiments.engine.specs.rows import Table
from experiments.engine.specs.spec import Backbone, Cost, Timing
from experiments.engine.timing import ceilings, clock, plain_steps, scale_cost, stage
from experiments.engine.timing.inference import latency
from experiments.engine.timing.networks import draw_network, size_backbone
from experiments.engine.timing.tasks import Task
from tests.support.paths import ROOT
from tests.support.stand_in import replace_device

BENCHMARK = "experiments/benchmark.py"
# Between two calls.
THEN = "--then"
# Rows that stay in each table; those that the session names are among them.
ROWS = {
    1: ("DiT-XL/2", "DiCo-XL"),
    2: ("DiCo-XL, 1.3M",),
    3: ("DiT (iso.)",),
    4: ("w/o CCA",),
}
# Networks of the claims that stay.
CLAIMED = ("dico_xl", "dit_xl_2", "dig_xl_2")


# ---- Processes


class Forked:
    """A part of the session: a command of the interpreter in a fork of this process."""

    def __init__(
        self, command: Sequence[str], cwd: Path, start_new_session: bool, env: Mapping[str, str]
    ) -> None:
        # What binds a part to the session stands before the interpreter's own arguments.
        before = bound([sys.executable])
        assert list(command[: len(before)]) == before, command
        assert start_new_session
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.chdir(cwd)
            os.environ.update(env)
            os._exit(_run(list(command[len(before) :])))

    def wait(self, timeout: float) -> int:
        """Return the exit status; TimeoutExpired says that there is none yet."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("a part", timeout)


class Forking(ForkContext):
    """Workers of jobs as forks, which need no server."""

    def set_forkserver_preload(self, names: list[str]) -> None:
        """Import nothing: a fork has all modules."""


def _run(arguments: list[str]) -> int:
    """Run a script or a module as the interpreter does, and return its exit status."""
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


# ---- Sizes


def shrink() -> None:
    """Make everything small: networks, inputs, tables, loops, and the time of a measurement."""
    build = backbones.build

    def build_tiny(name: str, **options: Any) -> nn.Module:
        return build(name, **(options | backbones.tiny_options_of(name)))

    backbones.build = build_tiny

    # Rows and their inputs.
    for tables in (main_results.TABLES, ablation.TABLES):
        for number in ROWS.keys() & tables.keys():
            tables[number] = _keep_rows(tables[number], ROWS[number])
    stages.LATENT_SIZE = 8
    stages.GPU_BATCH = 2
    speed_claims.COUNTED = tuple(filter(_is_claimed, speed_claims.COUNTED))
    speed_claims.FACTOR = 32
    speed_claims.BATCHES["cuda"] = (2, 1)
    speed_claims.NOT_DESCRIBED |= {"dim_h", "dis_h_2", "dis_s_2"}
    figure_3 = timings.figure_3
    timings.figure_3 = lambda *given: [
        replace(timing, size=8, batch=1) for timing in figure_3(*given) if timing.size == 32
    ]
    timings.FIGURE_3_SIZES["cuda"] = ("s",)
    timings.FIGURE_3_FAMILIES = (("dico", ""),)
    benchmarks.GPU_NETWORKS["cuda"] = ("dico_xl",)

    # Loops and operations.
    timings.SAMPLING_STEPS["cuda"] = steps.SAMPLING_STEPS["cuda"] = 2
    benchmarks.STEP_BATCH["cuda"] = benchmarks.KERNEL_BATCH["cuda"] = 2
    benchmarks.NEIGHBOUR_SIZES["cuda"] = (61, 37, 19)
    neighbours.PRODUCT_SIDES["cuda"] = 16
    kernel_cases.DIM, kernel_cases.TOKENS = 64, 4
    ceilings.SIDES["cuda"], ceilings.COPIED["cuda"] = (16, 24), 2**12

    # Clocks.
    clock.LEAST_SECONDS["cuda"] = steps.LEAST_SECONDS = 0.0
    clock.PATIENCE = stage.PATIENCE = latency.PATIENCE = 0.0
    kernels.GPU_REPEATS = 1


def _is_claimed(system: System) -> bool:
    return all(cost.backbone.name in CLAIMED for cost in system.costs)


def _keep_rows(table: Table, labels: Sequence[str]) -> Table:
    rows = tuple(replace(table.row(label), costs=()) for label in labels)
    return replace(table, rows=rows, against=None)


def fill_card() -> None:
    """Let DiCo-XL run out of memory when it trains in TF32."""
    build_task = stage.build_task

    def build_or_fail(network: Cost, spec: Timing, device: torch.device) -> Task:
        full = network.backbone.name == "dico_xl" and spec.what == "training"
        if full and spec.precision == "tf32":
            raise torch.cuda.OutOfMemoryError("the card is full")
        return build_task(network, spec, device)

    stage.build_task = build_or_fail


def warm_up() -> None:
    """Load here what every fork would load by itself in its first pass, backward pass and count."""
    network = Cost(Backbone("dico_s"), 8, 4, 1000)
    stage.measure_speed(Timing(network.backbone, 8, 4, 1000, batch=1, device="cuda"))
    plain_steps.bare_training(draw_network(size_backbone(network), torch.device("cpu")), 1)()
    scale_cost.count_declared(network)

    # What is here already is no garbage, and every fork would look at all of it.
    gc.collect()
    gc.freeze()


def main(arguments: list[str]) -> None:
    """Run the benchmark with everything replaced, and print how each call ended."""
    os.environ["PYTEST_ADDOPTS"] = "--collect-only -qq"
    session.subprocess = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)
    pool.mp = SimpleNamespace(get_context=lambda name: Forking(), parent_process=mp.parent_process)
    pool._start_server = lambda: None

    torch.set_num_threads(1)
    shrink()
    replace_device()
    warm_up()

    # Each call meets a card of its own, full or not.
    build_task = stage.build_task
    for call in _split(arguments):
        full = call[0] == "--full-card"
        if full:
            fill_card()
        status = _run([str(ROOT / BENCHMARK), *(call[1:] if full else call)])
        stage.build_task = build_task
        print(f"rehearsal: exit status {status}", flush=True)


def _split(arguments: list[str]) -> list[list[str]]:
    """Return the arguments of every call."""
    if THEN not in arguments:
        return [arguments]
    at = arguments.index(THEN)
    return [arguments[:at], *_split(arguments[at + 1 :])]


if __name__ == "__main__":
    main(sys.argv[1:])
