"""Everything that a GPU has to measure for this suite, in one call: `python -m experiments.measure_gpu --minutes 9`.

On a machine with a GPU and no network nothing is installed: copy the working tree there and call this in its root, with any python that
has torch, triton, timm and scipy, and pytest for the kernels' tests; Triton and torch.compile need a C and a C++ compiler. Pure Python
packages, as pytest or fla-core for DiG, can travel as wheels: put them on PYTHONPATH.

    python -m experiments.measure_gpu --minutes 9 --against dico_xl=theirs/models.py:DiCo_XL --bundle out/measured.tar.gz

Parts run in the order of their importance: the kernels' tests, the scan's bandwidth, steps eager, by CUDA graphs and so compiled, the share
of the device's ceilings, profiles, steps compiled alone, loops of 250 sampling steps by CUDA graphs in bf16 and TF32, precision and recall,
the claims about speed, kernels, tables, tests of compiled networks, Figure 3 and, last, the loops eager in every mode, one of which takes
minutes. Not all of it fits nine minutes. Every stage's record is written as it ends, and
the bundle, all that was measured so far, is written anew every few seconds, so a cut costs one stage at most. To go on, unpack it in the
results folder and call again, `--from` the part that was cut off; what has a record is not measured again, but steps and kernels are.
$DICO_COMMIT names the commit in the records where the tree has no history.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from experiments.engine.cli import Parser, require_device, run_command
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import REPOSITORY, Store

LEAST = 5.0  # seconds; with less left a part is not begun
OFTEN = 10.0  # seconds between two bundles
GRACE = 10.0  # seconds that a part has to end once it is told to
NETWORKS = {"cuda": ("dico_xl", "dit_xl_2"), "cpu": ("dico_s", "dit_s_2")}
ROWS = {"cuda": ("DiCo-XL", "DiT-XL/2"), "cpu": ("DiCo-S", "DiT-S/2")}


def parts(device: str, against: list[str]) -> dict[str, list[str]]:
    """Commands after the interpreter, by name, in order of importance; on a CPU what it can do of them, with small networks."""
    on, cuda = ["--device", device], device == "cuda"
    tests = [
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        *(
            f"tests/{name}.py"
            for name in (
                "backbones/test_kernels_choices",
                "backbones/test_kernels_ssm",
                "engine/training/test_accelerate",
            )
        ),
    ]
    efficiency, kernels = (
        ["experiments/efficiency.py", *on],
        ["experiments/benchmark_kernels.py", *on],
    )
    steps = [
        "experiments/benchmark_steps.py",
        *on,
        "--rounds",
        "3",
        "--networks",
        *NETWORKS[device],
        *(["--precision", "bf16", "tf32"] if cuda else []),
    ]
    steps += ["--against", *against] if against else []
    loops = [*efficiency, "--table", "1", "--task", "sampling", "--rows", *ROWS[device]]
    found = {
        "kernel tests": [*tests, "-m", "gpu and not slow"],
        "scan": [*kernels, "--kernels", "selective_scan", *(["--batch", "256"] if cuda else [])],
        "steps": steps,
        "steps by CUDA graphs": [*steps, "--graphs"],
        "steps compiled, by CUDA graphs": [*steps, "--compile", "--graphs"],
        "training beside the ceilings": [
            *efficiency,
            "--table",
            "1",
            "--task",
            "training",
            "--rows",
            *ROWS[device],
        ],
        **{
            f"profile of {row}": [*efficiency, "--profile", row, "--task", "training"]
            for row in ROWS[device]
        },
        "steps compiled": [*steps, "--compile"],
        "sampling loops": [*loops, *(["--graphs", "--modes", "bf16", "tf32"] if cuda else [])],
        "precision and recall": ["experiments/benchmark.py", "--neighbours", *on],
        "claims": [*efficiency, "--claims"],
        "kernels": kernels,
        **{
            f"table {number}, {task}": [*efficiency, "--table", str(number), "--task", task]
            for number, task in ((1, "forward"), (2, "forward"), (1, "training"))
        },
        "tests of compiled networks": [*tests, "-m", "gpu and slow"],
        "figure 3": [*efficiency, "--figure", "3"],
        **({"sampling loops, eager": loops} if cuda else {}),  # minutes a loop
    }
    return {
        name: command
        for name, command in found.items()
        if cuda or not ("--graphs" in command or "pytest" in command)
    }


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument(
        "--against",
        nargs="*",
        default=[],
        metavar="BACKBONE=FILE:NAME",
        help="other implementations to compare steps with, as in benchmark_steps.py",
    )
    parser.add_argument(
        "--from", dest="first", metavar="PART", help="begin with this part, by name"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.tar.gz",
        help="keep all that was measured in this file too",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="a CPU rehearses, with small networks (default: cuda)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    args = parser.parse_args()
    end, good, chosen, store = (
        time.monotonic() + 60 * args.minutes,
        True,
        parts(args.device, args.against),
        Store(args.results),
    )
    if args.first:
        if args.first not in chosen:
            parser.error(f"--from takes a part: {'; '.join(chosen)}")
        chosen = dict(list(chosen.items())[list(chosen).index(args.first) :])
    store.check_writable()
    require_device(args.device)
    for name, command in chosen.items():
        if end - time.monotonic() < LEAST:
            print(f"== {name}: not begun, the time is over", flush=True)
            good = False
            continue
        results = ["--results", str(store.root.resolve())] if "pytest" not in command else []
        started = time.monotonic()
        print(f"== {name}", flush=True)
        status = _run([*command, *results], end, store, args.bundle)
        good = good and status == "done"
        print(f"== {name}: {status} after {time.monotonic() - started:.0f} s", flush=True)
    return 0 if good else 1


def _run(command: list[str], end: float, store: Store, bundle: Path | None) -> str:
    """Run a part until it ends or the time does; what became of it."""
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    running = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    status = None
    while status is None and (left := end - time.monotonic()) > 0:
        try:
            status = running.wait(min(left, OFTEN))
        except subprocess.TimeoutExpired:
            pass
        pack(store, bundle)
    if status is not None:
        return "done" if status == 0 else f"ended with {status}"
    for sign in (signal.SIGTERM, signal.SIGKILL):  # its workers too, which would keep the device
        os.killpg(running.pid, sign)
        try:
            running.wait(GRACE)
            break
        except subprocess.TimeoutExpired:
            continue
    pack(store, bundle)
    return "cut off by the time"


def pack(store: Store, bundle: Path | None) -> None:
    """Write the records of this results folder into the bundle, whole or not at all."""
    if bundle and (store.root / "records").is_dir():
        with written_whole(bundle) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for record in sorted((store.root / "records").glob("*/[!.]*.json")):
                archive.add(record, record.relative_to(store.root))


if __name__ == "__main__":
    raise SystemExit(main())
