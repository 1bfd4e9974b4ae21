"""Everything that a GPU has to measure for this suite, in one call: `python experiments/measure_gpu.py --minutes 9`.

The kernels' tests first, then, most wanted first: ceilings and the claims about speed, steps eager, by CUDA graphs and compiled, against other implementations
(`--against`, as in benchmark_steps.py), the kernels' bandwidth, throughput tables, profiles and Figure 3. Every part keeps its
records as it goes, so a part that the time cuts off has lost one stage at most, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.engine.cli import Parser, guarded, require_device
from experiments.engine.store import REPOSITORY

LEAST = 5.0  # seconds; with less left a part is not begun


def parts(against: list[str]) -> list[tuple[str, list[str]]]:
    """(name, command after the interpreter), in order of importance."""
    on_gpu = ["--device", "cuda"]
    tests = [f"tests/test_{name}.py" for name in ("kernels_fused", "kernels_ssm", "kernels_gla", "kernels_linear", "accelerate")]
    efficiency, steps = ["experiments/efficiency.py", *on_gpu], ["experiments/benchmark_steps.py", *on_gpu, "--networks", "dico_xl", "dit_xl_2", "--precision", "tf32", "bf16"]
    return [
        ("kernel tests", ["-m", "pytest", "-q", "-n", "0", *tests]),
        ("claims", [*efficiency, "--claims"]),
        ("steps", [*steps, "--rounds", "5", *(["--against", *against] if against else [])]),
        ("steps by CUDA graphs", [*steps, "--rounds", "3", "--graphs"]),
        ("steps compiled", [*steps, "--rounds", "3", "--compile"]),
        ("precision and recall", ["experiments/benchmark.py", "--neighbours", *on_gpu]),
        ("kernels", ["experiments/benchmark_kernels.py", *on_gpu]),
        *((f"table {number}, {task}", [*efficiency, "--table", str(number), "--task", task]) for number, task in ((1, "forward"), (2, "forward"), (1, "training"))),
        *((f"profile of {row}", [*efficiency, "--profile", row, "--task", "training"]) for row in ("DiCo-XL", "DiT-XL/2")),
        ("steps compiled, by CUDA graphs", [*steps, "--rounds", "3", "--compile", "--graphs"]),
        ("figure 3", [*efficiency, "--figure", "3"]),
    ]


def main() -> int:
    return guarded(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--against", nargs="*", default=[], metavar="BACKBONE=FILE:NAME", help="other implementations to compare steps with")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="results folder (default: results)")
    args = parser.parse_args()
    end, good = time.monotonic() + 60 * args.minutes, True
    require_device("cuda")
    for name, command in parts(args.against):
        left = end - time.monotonic()
        if left < LEAST:
            print(f"== {name}: not begun, the time is over", flush=True)
            good = False
            continue
        results = ["--results", str(args.results.resolve())] if args.results and "pytest" not in command else []
        started = time.monotonic()
        print(f"== {name}", flush=True)
        running = subprocess.Popen([sys.executable, *command, *results], cwd=REPOSITORY, start_new_session=True)
        try:
            status = running.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGTERM)  # its workers too, which would keep the device
            running.wait()
            status = "cut off by the time"
        good = good and status == 0
        print(f"== {name}: {'done' if status == 0 else status} after {time.monotonic() - started:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
